"""`onchip explain`."""

import pytest

from onchip.cli import main


def explain(capsys, *arguments):
    with pytest.raises(SystemExit) as exited:
        main(["explain", "attention", *arguments])
    return exited.value.code, capsys.readouterr().out


def test_names_what_serves_and_what_does_not(capsys):
    code, out = explain(capsys, "--shape", "1,8192,32,128", "--kv-shape", "1,8192,8,128", "--device", "cuda")
    assert code == 0
    assert "→ triton" in out
    assert "cuda" in next(line for line in out.splitlines() if "cpu" in line)


def test_says_when_the_backend_asked_for_cannot_serve(capsys):
    code, out = explain(capsys, "--shape", "1,64,4,32", "--device", "cuda", "--backend", "cpu")
    assert code == 1 and "→" not in out


def test_tensors_are_not_allocated(capsys):
    code, out = explain(capsys, "--shape", "1000,100000,64,512")  # 13 TB
    assert code == 0 and "→" in out


def test_takes_every_option(capsys):
    code, out = explain(
        capsys, "--shape", "2,7,4,8", "--v-dim", "3", "--dtype", "bfloat16", "--causal", "--window", "3,-",
        "--batch-invariant", "--backend", "reference",
    )  # fmt: skip
    assert code == 1 and "reference  cannot serve: batch_invariant=True" in out


@pytest.mark.parametrize(
    ("operation", "shape"),
    [("causal_conv1d", "2,9,8"), ("selective_scan", "2,9,8"), ("ssd", "2,9,4,8")],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explains_the_state_space_operations(capsys, operation, shape, device):
    with pytest.raises(SystemExit) as exited:
        main(["explain", operation, "--shape", shape, "--device", device])
    lines = capsys.readouterr().out.splitlines()
    assert exited.value.code == 0
    assert lines[0] == operation
    assert [line[2:11].strip() for line in lines[1:]] == ["cpu", "triton", "reference"]


def test_explains_attention_over_a_cache(capsys):
    code, out = explain(capsys, "--shape", "4,1,32,128", "--kv-shape", "4,8192,8,128", "--cache", "--causal")
    assert code == 0
    assert out.splitlines()[0] == "attention_with_cache"
