"""Divergence guard: decides from losses and gradient norms when training has left the road, and what to do then.

A pure state machine: it neither loads nor saves. The loop asks :meth:`Guard.observe` after every step, and on
``Verdict.DIVERGED`` calls :meth:`Guard.roll_back`, returns to the last good checkpoint and goes on. The paper's authors
did this by hand (section 5); here it is part of the run, and its state is part of the checkpoint.
"""

import enum
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from megatron_m3.config import GuardConfig
from megatron_m3.errors import M3Error

HISTORIES_IN_MEAN = 5


class DivergenceError(M3Error):
    """Training diverged more often than the guard may mend."""


class Verdict(enum.Enum):
    """What one step's loss and gradient norm say."""

    GOOD = "good"
    SUSPICIOUS = "suspicious"
    DIVERGED = "diverged"


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """All that the guard remembers; plain numbers, so that it travels in a checkpoint or as JSON."""

    loss_mean: float = 0.0
    """Running mean of the loss over good steps."""
    norm_mean: float = 0.0
    """Running mean of the gradient norm over good steps."""
    history: int = 0
    """Good steps seen."""
    suspicious_since: int = -1
    """First training sequence of the pending run of suspicious steps; -1 when there is none."""
    suspicious_steps: int = 0
    """Steps in the pending run."""
    rollbacks: int = 0
    """Returns to a checkpoint so far."""
    skipped: list[list[int]] = field(default_factory=list)
    """Training sequences never to be read again, as [first, end) ranges in the order of training, ascending."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the argument of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The state that :meth:`to_dict` gave."""
        return cls(**values)


class Guard:
    """Watches a run; see the fields of :class:`GuardConfig` for the limits."""

    def __init__(self, config: GuardConfig, state: GuardState | None = None) -> None:
        self.config, self.state = config, state or GuardState()

    @property
    def lr_factor(self) -> float:
        """What the schedule's rate is multiplied by, after the returns so far."""
        return self.config.lr_factor**self.state.rollbacks

    @property
    def pending(self) -> bool:
        """Whether a suspicion is open; a checkpoint taken now is not a good one."""
        return self.state.suspicious_steps > 0

    def observe(self, loss: float, grad_norm: float, sequences: tuple[int, int]) -> Verdict:
        """Judge a step that trained on the ``[first, end)`` range ``sequences``.

        Raises:
            DivergenceError: the guard is off, so nothing can be mended, and there is nothing left to train.
        """
        state, finite = self.state, math.isfinite(loss) and math.isfinite(grad_norm)
        if not self.config.enabled:
            if not finite:
                raise DivergenceError(
                    f"guard.enabled=false: loss {loss:.4g}, grad norm {grad_norm:.4g} after sequences {sequences[0]}-"
                    f"{sequences[1] - 1}; the run can go on from its last checkpoint: lower optimizer.lr, or set "
                    "guard.enabled=true to skip these sequences"
                )
            return Verdict.GOOD
        if finite and not self._spikes(loss, grad_norm):
            count = state.history + 1
            weight = 1 / min(count, HISTORIES_IN_MEAN * max(1, self.config.min_history))
            self.state = replace(
                state, history=count, suspicious_since=-1, suspicious_steps=0,
                loss_mean=state.loss_mean + weight * (loss - state.loss_mean),
                norm_mean=state.norm_mean + weight * (grad_norm - state.norm_mean),
            )
            return Verdict.GOOD
        since = state.suspicious_since if self.pending else sequences[0]
        self.state = replace(state, suspicious_since=since, suspicious_steps=state.suspicious_steps + 1)
        if finite and self.state.suspicious_steps < self.config.spike_steps:
            return Verdict.SUSPICIOUS
        return Verdict.DIVERGED

    def _spikes(self, loss: float, grad_norm: float) -> bool:
        state, config = self.state, self.config
        return state.history >= max(1, config.min_history) and (
            loss > config.spike_factor * state.loss_mean or grad_norm > config.norm_spike_factor * state.norm_mean
        )

    def roll_back(self, end: int) -> tuple[int, int]:
        """Note a return to a checkpoint: the rate is lowered, and the suspicious sequences up to ``end`` are skipped.

        Returns:
            Their ``[first, end)`` range.

        Raises:
            DivergenceError: ``guard.max_rollbacks`` returns were made already.
        """
        if self.state.rollbacks >= self.config.max_rollbacks:
            raise DivergenceError(
                f"guard.max_rollbacks={self.config.max_rollbacks}: training diverged once more; "
                "lower optimizer.lr, look at the data, or raise the limit"
            )
        first = self.state.suspicious_since
        self.state = replace(
            self.state, rollbacks=self.state.rollbacks + 1, skipped=sorted([*self.state.skipped, [first, end]]),
            suspicious_since=-1, suspicious_steps=0,
        )
        return first, end

    def restore(self, checkpoint: GuardState) -> None:
        """Take up a checkpoint's state, but keep the returns made after it was taken and what they skip."""
        if checkpoint.rollbacks < self.state.rollbacks:
            checkpoint = replace(checkpoint, rollbacks=self.state.rollbacks, skipped=self.state.skipped)
        self.state = checkpoint

    def next_sequences(self, position: int, count: int) -> tuple[int, int]:
        """The next ``[first, end)`` of ``count`` sequences at or after ``position`` that meets no skipped range."""
        for first, end in self.state.skipped:
            if position < end and position + count > first:
                position = end
        return position, position + count
