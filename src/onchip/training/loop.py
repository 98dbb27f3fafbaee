"""The training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from onchip.data import Batches, ByteTokenizer, Corpus, Tokenizer, token_stream
from onchip.models import LanguageModel, save_model
from onchip.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from onchip.training.config import TrainConfig
from onchip.training.devices import native_bfloat16
from onchip.training.distributed import Processes
from onchip.training.evaluation import bits_per_byte
from onchip.training.interrupt import Interrupt
from onchip.training.metrics import Metrics
from onchip.training.optimizer import adamw, learning_rate
from onchip.training.progress import Display, Silent
from onchip.training.run import RunFolder, resume_command


class Trainer:
    """A run in progress: the model, its optimiser, the text, and how far it has come.

    Made anew in a run's folder it stands where the last checkpoint left the run. The weights after a step are a
    function of the settings, the corpus, the device and the number of threads and processes: neither an interruption
    nor a process killed at any point changes a bit of them.

    `tokenizer` is that of bytes unless another is given. `start` is a trained model whose weights the run begins with
    (in float32, whatever they were in); it is used up.

    Raises `ValueError` where the batch cannot be dealt out to the processes, the corpus is too short for one window, or
    a checkpoint is damaged.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        folder: RunFolder,
        *,
        device: torch.device | None = None,
        processes: Processes | None = None,
        tokenizer: Tokenizer | None = None,
        start: LanguageModel | None = None,
    ) -> None:
        self.config, self.corpus, self.folder = config, corpus, folder
        self.device = device or torch.device("cpu")
        self.processes = processes or Processes()
        self.tokenizer = tokenizer or ByteTokenizer()
        if config.model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(f"vocab_size: expected {self.tokenizer.vocab_size}, and got {config.model.vocab_size}")
        if config.model.positions is not None and config.context > config.model.positions:
            raise ValueError(
                f"context: expected at most the model's {config.model.positions} positions, and got {config.context}"
            )
        if start is not None and start.config != config.model:
            raise ValueError("start: expected a model of the run's config, and got another")
        self._shares = config.accumulate * self.processes.count
        if config.batch % self._shares:
            raise ValueError(
                f"batch: expected a multiple of accumulate × processes = {self._shares}, and got {config.batch}"
            )
        stream = token_stream(corpus.train, self.tokenizer)
        self._batches = Batches(stream, config.batch, config.context, config.seed, self.tokenizer.boundary_id)
        self.model = (_initial_model(config) if start is None else start.float()).to(self.device)
        self.optimizer = adamw(self.model, config.weight_decay)
        self.bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and native_bfloat16(self.device))
        self.step = 0
        if written := checkpoints(folder.checkpoints):
            self.step = load_checkpoint(written[-1], self.model, self.optimizer)
        self._forward: nn.Module = DistributedDataParallel(self.model) if self.processes.count > 1 else self.model

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    def train(self, display: Display | None = None) -> signal.Signals | None:
        """Train to the last step, or until SIGINT or SIGTERM: then the step at hand is finished, written and the signal
        returned.

        Raises `RuntimeError` where the loss is no longer finite or where a file cannot be written; the last checkpoint
        is then as it was.
        """
        config, stop = self.config, False
        with Interrupt() as interrupt, self._metrics() as metrics, display or Silent() as shown:
            while not self.finished and not stop:
                line = self._measured_step()
                stop = any(self.processes.sum(interrupt.signal is not None))
                with self._writing():
                    if metrics is not None:
                        metrics.append(line)
                    if self.step % config.checkpoint_every == 0 or self.finished or stop:
                        self._save(metrics)
                shown.show(line)
        return interrupt.signal or (signal.SIGTERM if stop else None)

    def evaluate(self, windows: int | None = None) -> float:
        """Bits per byte of the held-out documents; with `windows`, of that many windows spread over them."""
        return bits_per_byte(
            self.model,
            self.corpus.held_out,
            context=self.config.context,
            windows=windows,
            autocast=self._autocast(),
            processes=self.processes,
            tokenizer=self.tokenizer,
        )

    def _measured_step(self) -> dict[str, Any]:
        config, start = self.config, time.perf_counter()
        lr = learning_rate(self.step, peak=config.lr, warmup=config.warmup, steps=config.steps)
        loss, norm = self._update(lr)
        line: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.step * config.tokens_per_step,
            "tokens_per_second": round(config.tokens_per_step / (time.perf_counter() - start), 1),
        }
        if self.step % config.evaluate_every == 0 or self.finished:
            line["validation_bits_per_byte"] = self.evaluate(config.evaluate_windows)
        return line

    def _update(self, lr: float) -> tuple[float, float]:
        """One optimiser step: the mean loss in nats per token, and the gradient's norm before clipping."""
        total = torch.zeros((), device=self.device)
        for part in range(self.config.accumulate):
            share = part * self.processes.count + self.processes.rank
            batch = self._batches.part(self.step, share, self._shares).to(self.device)
            with self._gradients_stay_here(part < self.config.accumulate - 1):
                with self._autocast():
                    logits = self._forward(batch.tokens, cu_seqlens=batch.cu_seqlens)
                loss = F.cross_entropy(logits.float(), batch.targets) / self.config.accumulate
                torch.autograd.backward(loss)
            total += loss.detach()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        (mean,) = self.processes.sum(float(total) / self.processes.count)
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise RuntimeError(
                f"step {self.step + 1} has the loss {mean} and a gradient of norm {norm}: "
                f"begin again in another folder with a smaller learning rate than {self.config.lr}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return mean, norm

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Whether the processes leave their gradients to be summed after a later part of the batch."""
        if wanted and isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _save(self, metrics: Metrics | None) -> None:
        if metrics is not None:
            metrics.sync()
            # The model first: killed in between, a run makes the same model again.
            save_model(self.model, self.folder.path)
            save_checkpoint(self.folder.checkpoints, self.step, self.model, self.optimizer)
        self.processes.wait()

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Metrics | None]:
        if not self.processes.first:
            yield None
            return
        metrics = Metrics(self.folder.metrics, self.step)
        try:
            yield metrics
        finally:
            metrics.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            written = checkpoints(self.folder.checkpoints)
            kept = f"{written[-1].name} is whole" if written else "there is no checkpoint yet"
            raise RuntimeError(
                f"step {self.step} could not be written: {error.strerror or error}; {kept}: "
                f"make room, then `{resume_command(self.folder.path)}`"
            ) from error


def _initial_model(config: TrainConfig) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LanguageModel(config.model)
