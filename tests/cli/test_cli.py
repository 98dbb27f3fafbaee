"""The command's frame: help, version, and how errors come out."""

import errno
import warnings

import pytest

import onchip
from onchip.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `main` replaces

    def run(*arguments):
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        written = capsys.readouterr()
        return exited.value.code, written.out, written.err

    return run


def test_help_names_every_command(run):
    code, out, err = run("--help")
    assert code == 0 and not err
    for command in ("train", "generate", "show", "bench", "explain"):
        assert command in out


def test_without_arguments_it_explains_itself(run):
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "Usage" in out


def test_version(run):
    assert run("--version") == (0, f"onchip {onchip.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["dance"], "dance"),
        (["--loud"], "--loud"),
        (["explain", "attention"], "--shape"),
        (["explain", "attention", "--shape", "1,2,3"], "--shape"),
        (["explain", "attention", "--shape", "1,2,3,0"], "--shape"),
        (["explain", "attention", "--shape", "1,2,3,4", "--window", "near"], "--window"),
        (["explain", "attention", "--shape", "1,2,3,4", "--dtype", "int8"], "--dtype"),
        (["explain", "attention", "--shape", "1,2,3,4", "--device", "abacus"], "--device"),
        (["bench", "attention", "--suite", "sideways"], "--suite"),
        (["bench", "attention", "--device", "abacus"], "--device"),
        (["bench", "attention", "--lengths", "long"], "--lengths"),
        (["bench", "attention", "--out", "here", "--record"], "--out"),
        (["bench", "attention", "--threads", "0"], "--threads"),
    ],
)
def test_bad_input_is_one_line_naming_the_option(run, arguments, named):
    code, out, err = run(*arguments)
    assert code == 2 and not out
    assert named in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("heads must be\n  positive"), 2, "heads must be positive"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "corpus.txt"), 2, "corpus.txt: No such file"),
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), 1, "model.safetensors: No space left"),
        (RuntimeError("the machine is tired"), 1, "the machine is tired"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_a_command_have_a_code_and_a_line(run, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(onchip, "explain", fail)
    exited, out, err = run("explain", "attention", "--shape", "1,2,3,4")
    assert exited == code and not out
    assert err.startswith(f"onchip: {line}" if line else "") and err.count("\n") <= 1


def test_the_trace_of_an_error_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("ONCHIP_TRACEBACK", "1")
    monkeypatch.setattr(onchip, "explain", lambda *_, **__: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["explain", "attention", "--shape", "1,2,3,4"])


def test_a_warning_is_one_line(run, monkeypatch):
    def warn(*_, **__):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("slow today", stacklevel=1)
        raise ValueError("done")

    monkeypatch.setattr(onchip, "explain", warn)
    _, _, err = run("explain", "attention", "--shape", "1,2,3,4")
    assert err == "onchip: warning: slow today\nonchip: done\n"
