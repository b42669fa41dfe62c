"""The training loop: start or go on, step by step, save, and return to the last good checkpoint when training diverges.

``platform.select()`` must have been called before this module is imported.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_m3.config import Config
from megatron_m3.config.flops import ReferenceWork, step_flops
from megatron_m3.data import TrainingDataset, build_loader
from megatron_m3.errors import ConfigError, warn
from megatron_m3.manifest import atomic_path
from megatron_m3.model.checkpoint import (
    checkpoint_folder,
    checkpoint_step,
    list_checkpoints,
    newest_checkpoint,
    remove_checkpoint,
    remove_checkpoints,
)
from megatron_m3.model.gpt import DTYPES
from megatron_m3.platform import Platform
from megatron_m3.platform.distributed import parallel_world
from megatron_m3.tokenizer import Tokenizer
from megatron_m3.training import signals
from megatron_m3.training.alone import alone_in
from megatron_m3.training.checks import check_run
from megatron_m3.training.guard import Guard, GuardState, Verdict
from megatron_m3.training.metrics import NAME as METRICS_FILE
from megatron_m3.training.metrics import Metrics, peak_tflops, say
from megatron_m3.training.record import describe, write_run_record
from megatron_m3.training.schedule import gradient_in_references, kept_tokens, learning_rate
from megatron_m3.training.setup import Machinery, build_machinery
from megatron_m3.training.state import RunState, data_hashes, load_run, save_run, start_from
from megatron_m3.training.step import StepResult, training_step
from megatron_m3.training.telling import lone_errors_told

GUARD_FILE = "guard.json"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended."""

    step: int
    """Steps taken, over all its lives."""
    finished: bool
    """Whether all steps are done."""
    loss: float | None
    """Loss of the last step; None if none was taken in this life."""
    checkpoint: Path
    """The newest checkpoint."""


def train(config: Config) -> Summary:
    """Train as ``config`` says; every process of the world calls this.

    Raises:
        M3Error: settings, data or artifacts that do not work, a full disk, or divergence beyond the guard's limits.
    """
    check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    with parallel_world(config.parallel, config.training.seed) as platform, lone_errors_told():
        return train_in_world(config, platform)


def train_in_world(config: Config, platform: Platform) -> Summary:
    """:func:`train` on processes that have joined their groups already."""
    output, dataset = Path(config.training.output), TrainingDataset(config)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: must be at least the tokenizer's {tokenizer.vocab_size}"
        )
    found = list_checkpoints(output)
    if found and not config.checkpoint.resume:
        raise ConfigError(
            f"training.output={output}: holds checkpoints; choose another folder or set checkpoint.resume=true to go on"
        )
    with signals.Requests(output, watches_files=dist.get_rank() == 0) as requests:
        machinery = build_machinery(config, platform, tokenizer.prefix_ids(config.memory.prefix))
        loop = Loop(machinery, dataset, requests)
        loop.start(found)
        with alone_in(output, found):
            loop.begin(found)
            return loop.run()


class Loop:
    """One life of a run, from start or resumption to its end."""

    def __init__(self, machinery: Machinery, dataset: TrainingDataset, requests: signals.Requests) -> None:
        self.machinery, self.dataset, self.requests = machinery, dataset, requests
        self.hashes = data_hashes(dataset)
        self.config = config = machinery.config
        self.output = Path(config.training.output)
        self.first = dist.get_rank() == 0
        self.state, self.guard = RunState(), Guard(config.guard)
        self.metrics = Metrics(self.output, every=config.logging.every, tensorboard=config.logging.tensorboard)
        self.peak = config.logging.peak_tflops or peak_tflops(
            machinery.platform.device, DTYPES[config.training.dtype]
        )
        self.reader: Any = None
        self.reader_position = self.saved_step = -1
        self.timed_steps, self.seconds_per_step = 0, 0.0

    def start(self, found: list[Path]) -> None:
        """Go on from the newest of the run's checkpoints ``found``, or begin with new or given weights.

        Nothing is written: :meth:`begin` does, once what is there has been read and found to fit.
        """
        if found:
            self.state = load_run(self.machinery, found[-1], self.hashes)
            self.saved_step = self.state.step
            if (self.output / GUARD_FILE).exists():
                self.guard.state = GuardState.from_dict(json.loads((self.output / GUARD_FILE).read_text()))
            self.guard.restore(self.state.guard)
        elif self.config.training.init_from:
            start_from(self.machinery, self._initial_checkpoint(), self.hashes)

    def begin(self, found: list[Path]) -> None:
        """Write what a run has before its first step."""
        if self.first:
            self._begin_record(found)
        if not found and self.config.guard.enabled:
            self._save()

    def _begin_record(self, found: list[Path]) -> None:
        for leftover in self.output.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not found:  # what an earlier run left whose checkpoints are gone
            for name in (GUARD_FILE, METRICS_FILE):
                (self.output / name).unlink(missing_ok=True)
        write_run_record(self.machinery)
        self.metrics.begin(self.state.step)
        say(describe(self.machinery))
        if found:
            say(f"going on after step {self.state.step} from {found[-1]}")
        elif self.config.training.stage == "continual" and not self.config.training.init_from:
            warn("training.init_from is empty: the continual stage starts from random weights, and a model that "
                 "begins so learns to ignore its memories; give it a warmup checkpoint")

    def _initial_checkpoint(self) -> Path:
        return newest_checkpoint(Path(self.config.training.init_from))

    def run(self) -> Summary:
        """Train until all steps are done or someone asks to leave."""
        steps, result = self.config.training.steps, None
        while self.state.step < steps:
            result, verdict = self._step()
            leave = result.request == signals.LEAVE
            if verdict is Verdict.DIVERGED:
                self._roll_back(result)
            elif leave or result.request == signals.SAVE or self._save_is_due():
                self._save()
            if result.request and self.first:
                reason = self.requests.reason
                self.requests.obeyed()
            if leave:
                self._say(f"{reason if self.first else ''}: saved step {self.state.step} in "
                          f"{checkpoint_folder(self.output, self.state.step)}; run the same command to go on")
                break
        self.metrics.close()
        return Summary(step=self.state.step, finished=self.state.step >= steps, loss=result.loss if result else None,
                       checkpoint=checkpoint_folder(self.output, self.saved_step))

    def _step(self) -> tuple[StepResult, Verdict]:
        """One optimizer step on the next sequences that are not to be skipped."""
        config, start = self.config, time.perf_counter()
        sequences = self.guard.next_sequences(self.state.position, config.training.global_batch)
        if sequences[0] != self.reader_position:
            self.reader = build_loader(config, self.dataset, consumed=sequences[0],
                                       data_rank=self.machinery.data_rank, data_size=self.machinery.data_size)
        rate = self.guard.lr_factor * learning_rate(
            self.state.step, config.training.steps, config.optimizer.lr, config.schedule
        )
        kept = kept_tokens(self.state.step, config.training.steps, config.memory)
        gradient = gradient_in_references(self.state.step, config.training)
        result = training_step(self.machinery, self.reader, rate, self.requests.pending, kept, gradient)
        verdict = self.guard.observe(result.loss, result.grad_norm, sequences)
        self.state.step += 1
        self.state.position = self.reader_position = sequences[1]
        self._record(result, rate, kept, gradient, time.perf_counter() - start)
        return result, verdict

    def _record(self, result: StepResult, rate: float, kept: int, gradient: bool, seconds: float) -> None:
        if not self.first:
            return
        self.timed_steps += 1
        # the first step, which also sets things up, counts for nothing once there is another
        self.seconds_per_step += (seconds - self.seconds_per_step) * max(0.1, 1 / max(1, self.timed_steps - 1))
        training = self.config.training
        work = ReferenceWork(read=result.read / training.global_batch, encoded=result.encoded / training.global_batch,
                             gradient=gradient, num_kept=kept)
        prefix = len(self.machinery.prefix) if training.stage == "continual" else 0
        flops = step_flops(self.config, prefix_length=prefix, work=work).total
        read = max(result.read, 1)
        shares = {"repeats": 1 - (result.encoded + result.reused) / read} if training.stage == "continual" else {}
        shares |= {"reused": result.reused / read} if self.machinery.memories is not None else {}
        self.metrics.step({
            "step": self.state.step,
            "steps": training.steps,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "tokens": result.tokens,
            **shares,
            "sequences": self.state.position,
            "seconds": seconds,
            "tokens_per_second": training.global_batch * self.config.data.sequence_length / seconds,
            "mfu": flops / (seconds * self.peak * 1e12 * dist.get_world_size()),
            "seconds_left": (training.steps - self.state.step) * self.seconds_per_step,
        })

    def _save_is_due(self) -> bool:
        return self.state.step % self.config.checkpoint.every == 0 or self.state.step == self.config.training.steps

    def _save(self) -> None:
        self.state.guard = self.guard.state
        save_run(self.machinery, self.state, self.hashes, good=not self.guard.pending)
        self._drop_memories()
        self.saved_step = self.state.step
        if self.first:
            remove_checkpoints(self.output, self.config.checkpoint.keep)

    def _drop_memories(self) -> None:
        """Hold none beside a checkpoint, so that the run goes on from it alike, whether it was stopped or not."""
        if self.machinery.memories is not None:
            self.machinery.memories.drop()

    def _roll_back(self, result: StepResult) -> None:
        """Return to the last good checkpoint; skip the sequences since the suspicion arose, at a lower rate."""
        left, folder = self.state.step, self._last_trusted_checkpoint()
        skipped = self.guard.roll_back(self.state.position)
        self.state = load_run(self.machinery, folder, self.hashes)
        self._drop_memories()
        self.guard.restore(self.state.guard)
        self.saved_step, self.reader_position = self.state.step, -1
        if not self.first:
            return
        for other in list_checkpoints(self.output):
            if checkpoint_step(other) > checkpoint_step(folder):
                remove_checkpoint(other)
        with atomic_path(self.output / GUARD_FILE) as path:
            path.write_text(json.dumps(self.guard.state.to_dict()) + "\n")
        self.metrics.begin(self.state.step)
        self.metrics.write({
            "event": "rollback", "from": left, "to": self.state.step, "loss": result.loss,
            "grad_norm": result.grad_norm, "skipped": skipped, "lr_factor": self.guard.lr_factor,
        })
        self._say(
            f"step {left} diverged (loss {result.loss:.4g}, grad norm {result.grad_norm:.4g}): back to step "
            f"{self.state.step}, skipping sequences {skipped[0]}-{skipped[1] - 1}, learning rate x "
            f"{self.guard.lr_factor:g} (return {self.guard.state.rollbacks} of {self.config.guard.max_rollbacks})"
        )

    def _last_trusted_checkpoint(self) -> Path:
        """The newest checkpoint that at least one healthy step followed: a step's loss judges the weights before it."""
        good = list_checkpoints(self.output, good=True)
        last_healthy = self.state.step - self.guard.state.suspicious_steps
        return ([folder for folder in good if checkpoint_step(folder) < last_healthy] or good)[-1]

    def _say(self, line: str) -> None:
        if self.first:
            say(line)
