"""The package as it is installed."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

import onchip


def loaded_by(statement: str) -> set[str]:
    """The modules a fresh interpreter has loaded after `statement`, or when that exits."""
    tell = "import atexit, json, sys; atexit.register(lambda: print(json.dumps(list(sys.modules)), file=sys.stderr))"
    run = subprocess.run([sys.executable, "-c", f"{tell}\n{statement}"], capture_output=True, text=True, check=True)
    return set(json.loads(run.stderr))


def test_native_kernels_are_built():
    if importlib.util.find_spec("onchip._native") is None:
        assert "ONCHIP_REQUIRE_NATIVE" not in os.environ, "onchip._native was not built"
        pytest.skip("onchip._native was not built here: the reference serves")


def test_version_is_the_metadatas():
    assert importlib.metadata.version("onchip") == onchip.__version__


def test_types_are_shipped():
    assert importlib.resources.files("onchip").joinpath("py.typed").is_file()


@pytest.mark.parametrize("module", ["onchip", "onchip.ops", "onchip.nn", "onchip.models", "onchip.testing"])
def test_import_is_light(module):
    loaded = loaded_by(f"import {module}")
    assert "torch._dynamo" not in loaded  # of which half is a compiler
    assert not loaded & {"triton", "matplotlib", "typer", "rich", "transformers", "flash_attn", "mamba_ssm"}


def test_command_line_does_not_load_torch_to_explain_itself():
    loaded = loaded_by("import onchip.cli; onchip.cli.main(['--help'])")
    assert "torch" not in loaded
