"""What is public is described, typed, and shown working.

Public is what a module of the package names in `__all__`. The examples themselves run as doctests.
"""

import importlib
import inspect
import pkgutil
import re

import pytest

import onchip


def public_names():
    modules = [onchip, *(importlib.import_module(m.name) for m in pkgutil.walk_packages(onchip.__path__, "onchip."))]
    for module in modules:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{module.__name__}.{name}", value


PUBLIC = dict(public_names())
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


def test_the_main_names_are_public():
    assert {"onchip.attention", "onchip.attention_with_lse", "onchip.explain", "onchip.hadamard"} <= FUNCTIONS.keys()
    assert {"onchip.attention_fp8", "onchip.attention_fp8_with_lse"} <= FUNCTIONS.keys()
    assert {"onchip.attention_with_cache", "onchip.attention_with_cache_and_lse"} <= FUNCTIONS.keys()
    assert {"onchip.linear", "onchip.merge_attention", "onchip.rms_norm"} <= FUNCTIONS.keys()
    assert {"onchip.models.LanguageModel", "onchip.nn.mixers.Attention", "onchip.training.Trainer"} <= PUBLIC.keys()


def test_explain_knows_the_functions_that_take_a_backend():
    with pytest.raises(TypeError, match="that take backend=") as error:
        onchip.explain(onchip.linear)
    known = set(re.search(r"\((.*?)\)", str(error.value))[1].split(", "))
    functions = {name: f for name in onchip.__all__ if inspect.isfunction(f := getattr(onchip, name))}
    assert known == {n for n, f in functions.items() if "backend" in inspect.signature(f).parameters} - {"explain"}


@pytest.mark.parametrize("name", PUBLIC)
def test_has_a_docstring_of_its_own(name):
    doc = PUBLIC[name].__doc__
    assert doc and doc.strip()
    assert not doc.startswith(f"{PUBLIC[name].__name__}(")  # what dataclasses write where nobody did


@pytest.mark.parametrize("name", FUNCTIONS)
def test_has_an_example(name):
    assert ">>> " in inspect.getdoc(FUNCTIONS[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_typed(name):
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter
