"""When each pass of a pipelined step runs, by megatron-core's schedules, if passes took the times given.

The model chunks are numbered in the order of their layers: chunk ``c`` lies on stage ``c % stages``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Pass(NamedTuple):
    """One pass of a micro-batch through a chunk."""

    backward: bool
    micro_batch: int
    chunk: int


@dataclass(frozen=True, kw_only=True)
class PipelineTime:
    """A step's forward and backward passes, in the unit of the times given."""

    total: float
    """From the first pass to the end of the last one."""
    busy: tuple[float, ...]
    """What each stage works of it; it waits for the rest."""

    @property
    def bubble(self) -> float:
        """Share of all stages' time in which they wait."""
        return 1 - sum(self.busy) / (len(self.busy) * self.total)


def stage_passes(stage: int, stages: int, interleave: int, micro_batches: int) -> list[Pass]:
    """The passes of a stage in their order: one forward, one backward (1F1B), after as many forward as fill the pipe.

    With ``interleave`` chunks on a stage, ``stages`` micro-batches pass through one chunk before the next has its turn.
    """
    number = micro_batches * interleave
    ahead = stages - stage - 1 if interleave == 1 else 2 * (stages - stage - 1) + (interleave - 1) * stages
    ahead = min(ahead, number)
    turns = [(one, turn) for first in range(0, micro_batches, stages) for turn in range(interleave)
             for one in range(first, min(first + stages, micro_batches))]
    forward = [Pass(False, one, turn * stages + stage) for one, turn in turns]
    backward = [Pass(True, one, (interleave - 1 - turn) * stages + stage) for one, turn in turns]
    between = [step for pair in zip(forward[ahead:], backward, strict=False) for step in pair]
    return [*forward[:ahead], *between, *backward[number - ahead :]]


@functools.lru_cache(maxsize=16)
def _program(stages: int, chunks: int, micro_batches: int) -> list[tuple[int, int, int]]:
    """All passes, each after those it waits for: its stage, its place in (forward..., backward...) times, and the place
    in this list of the pass whose output it takes, -1 if none."""
    orders = [stage_passes(stage, stages, chunks // stages, micro_batches) for stage in range(stages)]
    at, places, program = [0] * stages, dict[Pass, int](), list[tuple[int, int, int]]()
    while len(places) < 2 * chunks * micro_batches:
        before = len(places)
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                one = order[at[stage]]
                source = _source(one, chunks)
                if source is not None and source not in places:
                    break
                places[one] = len(program)
                program.append((stage, one.chunk + chunks * one.backward, places[source] if source else -1))
                at[stage] += 1
        assert len(places) > before, "the schedule waits for itself"
    return program


def _source(one: Pass, chunks: int) -> Pass | None:
    """The pass whose output a pass takes."""
    if not one.backward:
        return one._replace(chunk=one.chunk - 1) if one.chunk else None
    last = one.chunk == chunks - 1
    return one._replace(backward=False) if last else one._replace(chunk=one.chunk + 1)


def pipeline_time(forward: Sequence[float], backward: Sequence[float], stages: int, micro_batches: int) -> PipelineTime:
    """Run the schedule; messages take no time.

    Args:
        forward: time of each chunk's forward pass over a micro-batch.
        backward: the same for the backward pass.
        stages: pipeline stages; divides the number of chunks.
        micro_batches: of a step; with several chunks on a stage, a multiple of ``stages``.
    """
    import numpy as np

    total = step_times(np.array([forward], np.float64), np.array([backward], np.float64), stages, micro_batches)
    busy = [micro_batches * (sum(forward[stage::stages]) + sum(backward[stage::stages])) for stage in range(stages)]
    return PipelineTime(total=float(total[0]), busy=tuple(busy))


def step_times(forward_NC: "np.ndarray", backward_NC: "np.ndarray", stages: int, micro_batches: int) -> "np.ndarray":
    """From the first pass to the end of the last one, [N], for N times of C chunks; see :func:`pipeline_time`."""
    import numpy as np

    times = np.concatenate([forward_NC, backward_NC], 1).T.copy()
    now, ends = [np.zeros(len(forward_NC))] * stages, list[np.ndarray | None]()
    for stage, place, source in _program(stages, forward_NC.shape[1], micro_batches):
        start = now[stage]
        if source >= 0:
            came, ends[source] = ends[source], None  # one pass takes it, and memory is for those under way
            assert came is not None
            start = np.maximum(start, came)
        now[stage] = start + times[place]
        ends.append(now[stage])
    return np.max(now, 0)


def most_held(sizes: Sequence[float], stage: int, stages: int, micro_batches: int) -> float:
    """Most that a stage holds for backward passes at once, of ``sizes`` for a micro-batch in each chunk."""
    held = most = 0.0
    for one in stage_passes(stage, stages, len(sizes) // stages, micro_batches):
        held += -sizes[one.chunk] if one.backward else sizes[one.chunk]
        most = max(most, held)
    return most
