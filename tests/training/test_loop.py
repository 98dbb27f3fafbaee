"""The loop: it learns, and nothing that happens to it changes a bit of what it learns."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onchip.models import ModelConfig
from onchip.training import Trainer
from onchip.training.checkpoint import checkpoints
from onchip.training.metrics import read_metrics
from onchip.training.progress import Silent

MakeTrainer = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in trainer.model.state_dict().items()}


def lines(trainer: Trainer) -> list[dict[str, object]]:
    """The metrics, without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key != "tokens_per_second"}
        for line in read_metrics(trainer.folder.metrics)
    ]


class At(Silent):
    """Does something when the run is at some step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def show(self, line: dict[str, object]) -> None:
        if line["step"] == self.step:
            self.action()


class Killed(BaseException):
    """Ends a run without the run's noticing."""


def kill() -> None:
    raise Killed


def test_it_learns(trainer: MakeTrainer) -> None:
    run = trainer(steps=60, lr=3e-2)
    before = run.evaluate()
    assert run.train() is None
    # Better than the best that a model without context could do.
    text = b"".join(document.data for document in run.corpus.held_out)
    frequencies = [text.count(byte) / len(text) for byte in set(text)]
    assert run.evaluate() < -sum(p * math.log2(p) for p in frequencies) < before


def test_a_run_is_the_same_each_time_and_another_with_another_seed(trainer: MakeTrainer) -> None:
    one, two, other = trainer("one"), trainer("two"), trainer("other", seed=1)
    torch.manual_seed(99)  # what the caller draws is none of its business
    for run in (one, two, other):
        run.train()
    assert weights(one) == weights(two) != weights(other)
    assert lines(one) == lines(two) != lines(other)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_a_killed_and_resumed_run_is_that_of_an_uninterrupted_one(trainer: MakeTrainer, step: int) -> None:
    whole = trainer("whole")
    whole.train()
    with pytest.raises(Killed):
        trainer("killed").train(At(step, kill))
    resumed = trainer("killed")
    assert resumed.step == step - step % 2  # a checkpoint every second step
    resumed.train()
    assert weights(resumed) == weights(whole)
    assert lines(resumed) == lines(whole)
    assert trainer("killed").finished


@pytest.mark.parametrize(
    "layers",
    [
        [{"mixer": "mamba", "d_state": 4}],
        [{"mixer": "mamba2", "d_state": 8, "head_dim": 8}, {"mixer": "attention", "n_heads": 2, "d_mlp": 32}],
    ],
    ids=["mamba", "hybrid"],
)
def test_a_state_space_is_resumed_bit_for_bit_too(trainer: MakeTrainer, layers: list[dict[str, object]]) -> None:
    model = ModelConfig(vocab_size=257, d_model=16, layers=layers, d_mlp=None)
    whole = trainer("whole", model=model)
    whole.train()
    with pytest.raises(Killed):
        trainer("killed", model=model).train(At(5, kill))
    resumed = trainer("killed", model=model)
    assert resumed.step == 4
    resumed.train()
    assert weights(resumed) == weights(whole)
    assert lines(resumed) == lines(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(trainer: MakeTrainer, number: signal.Signals) -> None:
    whole = trainer("whole")
    whole.train()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = trainer()
    assert run.train(At(3, lambda: signal.raise_signal(number))) == number
    assert (run.step, run.finished) == (4, False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = trainer()
    assert resumed.step == 4
    resumed.train()
    assert weights(resumed) == weights(whole)
    assert lines(resumed) == lines(whole)


def test_a_second_signal_is_not_held_back(trainer: MakeTrainer) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer().train(At(3, twice))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_costs_nothing_but_the_steps_since_the_checkpoint(
    trainer: MakeTrainer, disk_full_at: Callable[[int], None]
) -> None:
    whole = trainer("whole")
    whole.train()
    # Armed after step 4's checkpoint: the write that fails is one of step 6's.
    with pytest.raises(RuntimeError, match=r"step 6 .*No space left .*step_00000004 is whole.*onchip train --out"):
        trainer().train(At(4, lambda: disk_full_at(5)))
    resumed = trainer()
    assert resumed.step == 4
    resumed.train()
    assert weights(resumed) == weights(whole)
    assert lines(resumed) == lines(whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(trainer: MakeTrainer) -> None:
    run = trainer()

    def spoil() -> None:
        with torch.no_grad():
            run.model.embedding.weight[ord("e")] = math.inf

    with pytest.raises(RuntimeError, match=r"step 4 has the loss nan .* smaller learning rate than 0.01"):
        run.train(At(3, spoil))
    assert [path.name for path in checkpoints(run.folder.checkpoints)] == ["step_00000002"]


def test_parts_of_a_batch_add_up_to_it(trainer: MakeTrainer) -> None:
    gradients = []
    for accumulate in (1, 2, 4):
        run = trainer(f"in {accumulate}", accumulate=accumulate, clip=1e9)
        run.model.double()
        caught: list[torch.Tensor] = []
        run.optimizer.register_step_pre_hook(
            lambda optimizer, *_, caught=caught: caught.extend(
                parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]
            )
        )
        run._update(lr=0.0)
        gradients.append(caught)
    for whole, *parts in zip(*gradients, strict=True):
        for part in parts:
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-9)  # logits are float32


def test_the_gradient_is_clipped_to_its_limit(trainer: MakeTrainer) -> None:
    run = trainer(clip=1e-3)
    norms: list[float] = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in run.model.parameters()))  # type: ignore[union-attr]
        )
    )
    run.train()
    assert all(norm <= 1e-3 * (1 + 1e-5) for norm in norms)
    assert all(line["grad_norm"] > 1e-3 for line in lines(run))  # type: ignore[operator]


def test_metrics_have_every_step(trainer: MakeTrainer) -> None:
    run = trainer()
    run.train()
    written = read_metrics(run.folder.metrics)
    assert [line["step"] for line in written] == list(range(1, 9))
    assert [line["tokens"] for line in written] == [64 * step for step in range(1, 9)]
    looks = [line["step"] for line in written if "validation_bits_per_byte" in line]
    assert looks == [3, 6, 8]
    assert written[-1]["validation_bits_per_byte"] == run.evaluate(run.config.evaluate_windows)
    assert set(written[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"}


def test_bfloat16_is_used_when_asked_for(trainer: MakeTrainer) -> None:
    plain, asked = trainer("plain", precision="float32"), trainer("asked", precision="bfloat16")
    seen: list[torch.dtype] = []
    asked.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    plain.train()
    asked.train()
    assert set(seen) == {torch.bfloat16}
    first, second = lines(plain)[0]["loss"], lines(asked)[0]["loss"]
    assert first != second
    assert second == pytest.approx(first, rel=2**-7)
    assert all(parameter.dtype == torch.float32 for parameter in asked.model.parameters())


def test_bad_requests_are_refused_before_any_work(trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="corpus: expected more than one window of 100000 tokens"):
        trainer(context=100_000)
    config = trainer().config
    with pytest.raises(ValueError, match="vocab_size: expected 257, and got 9"):
        trainer(model=type(config.model).from_dict({**config.model.to_dict(), "vocab_size": 9}))


DISTRIBUTED = """
import sys
from pathlib import Path
import torch
from conftest import CONFIG, CORPUS
from onchip.training import RunFolder, Trainer
from onchip.training.distributed import joined

torch.set_num_threads(1)
cpu = torch.device("cpu")
with joined(cpu) as processes:
    trainer = Trainer(CONFIG, CORPUS, RunFolder(Path(sys.argv[1])), device=cpu, processes=processes)
    trainer.train()
    whole = trainer.evaluate()
    if processes.first:
        print(processes.count, whole)
"""


def launch(processes: int, *command: str | Path, **environment: str) -> str:
    """Run a script by torchrun on this machine alone; what it printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        [*torchrun, *command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            out, err = launcher.communicate(timeout=240)
        finally:
            launcher.terminate()  # and with it, where they hang, the processes that it started
    assert launcher.returncode == 0, err
    return out


@pytest.mark.slow
def test_two_processes_learn_what_one_does(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer("one")
    one.train()
    two = trainer("two")
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    processes, whole = launch(2, script, two.folder.path, PYTHONPATH=str(Path(__file__).parent)).split()
    assert processes == "2"
    # Sums in another order: the last bits of float32 differ, and the steps carry them on.
    assert float(whole) == pytest.approx(one.evaluate(), rel=1e-5)
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        assert ours == {key: pytest.approx(value, rel=1e-4) for key, value in theirs.items()}
    # A run of two processes can be gone on with by one, and the other way round.
    assert trainer("two").finished
