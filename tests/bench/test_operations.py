"""The frame that benchmarks of operations share: nothing wrong is timed, and rows come back as they went."""

import dataclasses
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

import onchip
from onchip.bench import attention_features, causal_conv1d, machine, operations, report, rows, selective_scan, ssd
from onchip.bench.operations import Contender
from onchip.integrations import causal_conv1d as conv_package
from onchip.integrations import mamba_ssm

MODULES = (causal_conv1d, selective_scan, ssd)
SMALL = {"B": 2, "T": 9, "D": 8, "W": 4, "H": 4, "P": 8, "N": 8}


def small(case):
    sizes = tuple((name, min(size, SMALL[name])) for name, size in case.sizes)
    return dataclasses.replace(case, sizes=sizes)


def cases_of(device):
    return [
        pytest.param(module, small(case), id=f"{module.__name__.split('.')[-1]} {case.suite} {case.dtype}")
        for module in MODULES
        for case in module.cases(module.SUITES, dtypes=[], lengths=[], quick=True, device=device)
    ]


def chunk_simple_gla(q, k, v, g, scale):
    """What fla computes, token by token."""
    state, outs = 0.0, []
    for q_t, k_t, v_t, g_t in zip(*(x.float().unbind(1) for x in (q, k, v, g)), strict=True):
        state = g_t.exp()[..., None, None] * state + k_t[..., :, None] * v_t[..., None, :]
        outs.append((scale * q_t[..., None] * state).sum(-2))
    return torch.stack(outs, 1).to(v.dtype), None


def fla_convolution(x, weight, bias, activation):
    return onchip.causal_conv1d(x, weight, bias, activation=activation), None


@pytest.fixture
def packages(monkeypatch):
    """The packages that have kernels for GPUs only, played by onchip and by a loop."""
    modules = {"fla": {}, "fla.modules": {}, "fla.modules.convolution": {"causal_conv1d": fla_convolution},
               "fla.ops": {}, "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla}}  # fmt: skip
    for name, functions in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    for package in (mamba_ssm, conv_package):
        package.install()
    yield
    for package in (mamba_ssm, conv_package):
        package.uninstall()


@pytest.mark.parametrize("module, case", [*cases_of("cpu"), *cases_of("cuda")])
def test_every_contender_computes_the_same(module, case, packages):
    pytest.importorskip("transformers")
    held = module.contest(case)
    operations.check(case, held)
    names = list(held.contenders)
    assert names[0] == "onchip" and ("causal_conv1d" if module is causal_conv1d else "mamba_ssm") in names
    assert ("fla" in names) is (module is not selective_scan and case.suite != "step")
    for name in names:
        found = module.contest(case).contenders[name].found()  # anew: a step moves its state on
        for of, want, got in zip(held.names, held.truth(), found, strict=True):
            assert (got.double() - want).abs().max() <= 0.1 * want.abs().max(), f"{of} of {name}"


@pytest.mark.parametrize("module, case", cases_of("cuda"))
def test_cases_are_timed_and_kept(module, case, tmp_path):
    row = operations.measure(module.contest, case, machine.describe("cpu", "default"), seconds=0.0, min_rounds=3)
    assert row.rounds >= 3 and row.ratio and row.served_by == "cpu"
    assert row.of == ("mm" if module is ssd and case.suite != "step" else "copy")
    assert row.fraction["onchip"] > 0 and row.rate["onchip"] > 0 and row.rate[row.of] > 0
    rows.merge(tmp_path / "rows.jsonl", [row])
    assert rows.read(tmp_path / "rows.jsonl") == [row]
    assert len(rows.merge(tmp_path / "rows.jsonl", [row])) == 1


def test_a_gpu_gets_as_many_tokens_at_any_length_and_more_than_its_caches_hold():
    for module in MODULES:
        for case in module.cases(module.SUITES, dtypes=[], lengths=[], quick=False, device="cuda"):
            assert case.dtype == "bfloat16"
            assert case.suite == "step" or case.batch * case["T"] == 16384


def test_features_of_attention_are_measured_on_either_device():
    for device in ("cpu", "cuda"):
        plan = attention_features.cases(("dropout", "paged"), dtypes=[], lengths=[16], quick=True, device=device)
        for case in plan:
            operations.check(case, attention_features.contest(case))


def test_a_package_that_does_not_run_is_left_out_and_named(capsys, monkeypatch):
    monkeypatch.setattr(report.console, "width", 200)

    def broken():
        raise RuntimeError("no kernel image is available\nand more")

    assert operations.optional("torch", lambda: Contender(broken)) == {}
    assert capsys.readouterr().out == "torch is left out: RuntimeError: no kernel image is available\n"
    assert operations.optional("no_such_package", broken) == {}
    assert operations.optional("torch", lambda: Contender(lambda: ())).keys() == {"torch"}


def test_what_is_wrong_is_not_timed():
    def wrong(case):
        held = causal_conv1d.contest(case)
        ours = held.contenders["onchip"]
        off = Contender(lambda: tuple(x + 0.01 for x in ours.call()))
        return dataclasses.replace(held, contenders=held.contenders | {"onchip": off})

    case = small(causal_conv1d.cases(["forward"], dtypes=["float32"], lengths=[9], quick=True)[0])
    with pytest.raises(ArithmeticError, match=r"float32 T 9 .* out is off by 1\.0e-02"):
        operations.check(case, wrong(case))


@pytest.mark.slow
def test_the_command(tmp_path):
    options = ("--suite", "forward", "--dtype", "float32", "--lengths", "9", "--threads", "1", "--seconds", "0")
    command = [sys.executable, "-m", "onchip", "bench", "causal_conv1d", "--quick", *options, "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "causal_conv1d, forward" in run.stdout and "over conv1d" in run.stdout
    wanted = causal_conv1d.cases(["forward"], dtypes=["float32"], lengths=[9], quick=True)
    assert [row.case for row in rows.read(tmp_path / "causal_conv1d.jsonl")] == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    command = [sys.executable, "-m", "onchip", "bench", "ssd", "--device", "cuda"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr == "onchip: --device cuda: PyTorch finds no GPU here\n"
