"""The split with the shortest step where a stage has several chunks, so that the order of the passes counts too.

The schedule is run for all candidates at once, and only for those that a lower bound does not rule out: no stage ends
before its first micro-batch has come down to it, all its passes are done, and the last gradient has gone up from it.

Letters: N splits, C chunks (cuts have one more), P parts.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import TYPE_CHECKING

from megatron_m3.config.pipeline_time import step_times

if TYPE_CHECKING:
    import numpy as np

EVERY = 20_000
"""Splits that are all looked at; of more, those that can be reached from the starts by better and better ones."""
TOGETHER = 4096
"""Splits that are judged at a time."""
SAME = 1 - 1e-9
"""Share of a time from which on another counts as no shorter."""


class SplitSearch:
    """Looks for the cuts of parts into chunks with the shortest step of so many micro-batches."""

    def __init__(self, parts: Sequence[tuple[float, float]], stages: int, micro_batches: int, first: int) -> None:
        """``parts`` have their forward and backward time; the first chunk takes at least ``first`` of them."""
        import numpy as np

        self.stages, self.micro_batches, self.first, self.num_parts = stages, micro_batches, first, len(parts)
        self.sums_P2 = np.concatenate([np.zeros((1, 2)), np.cumsum(parts, 0)])

    def best(self, starts: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The best split of all if they are few, else the best that shifts of ``starts`` lead to."""
        import numpy as np

        chunks = len(starts[0]) - 1
        if math.comb(self.num_parts - 1, chunks - 1) <= EVERY:
            found = self._least(_every(self.num_parts, chunks), math.inf)
            assert found is not None, "no split is allowed"
            return tuple(found[0].tolist())
        shifts_NC, reached = _shifts(chunks), list[tuple[float, tuple[int, ...]]]()
        for start in starts:
            cuts_C = np.array(start)
            least = float(self.times(cuts_C[None])[0])
            while found := self._least(cuts_C + shifts_NC, least * SAME):
                cuts_C, least = found
            reached.append((least, tuple(cuts_C.tolist())))
        return min(reached, key=lambda one: one[0])[1]

    def times(self, cuts_NC: "np.ndarray") -> "np.ndarray":
        """Time of a step with each split, [N]."""
        return step_times(*self._chunks(cuts_NC), self.stages, self.micro_batches)

    def at_least(self, cuts_NC: "np.ndarray") -> "np.ndarray":
        """What no step with each split can be shorter than, [N]."""
        import numpy as np

        both_NC = np.add(*self._chunks(cuts_NC))
        above_NC = both_NC.cumsum(1) - both_NC
        work_NC = [self.micro_batches * both_NC[:, stage :: self.stages].sum(1) for stage in range(self.stages)]
        return np.max([work + above_NC[:, stage] for stage, work in enumerate(work_NC)], 0)

    def _chunks(self, cuts_NC: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
        import numpy as np

        costs_NC2 = np.diff(self.sums_P2[cuts_NC], axis=1)
        return costs_NC2[..., 0], costs_NC2[..., 1]

    def _least(self, cuts_NC: "np.ndarray", below: float) -> tuple["np.ndarray", float] | None:
        """The allowed split with the shortest step, and its time; None where none is shorter than ``below``."""
        import numpy as np

        found = None
        cuts_NC = cuts_NC[(cuts_NC[:, 1] >= self.first) & (np.diff(cuts_NC, axis=1) > 0).all(1)]
        bound_N = self.at_least(cuts_NC)
        order_N = bound_N.argsort(kind="stable")
        for first in range(0, len(order_N), TOGETHER):
            some_N = order_N[first : first + TOGETHER]
            some_N = some_N[bound_N[some_N] < below]
            if not len(some_N):
                break
            times_N = self.times(cuts_NC[some_N])
            if (shortest := times_N.min()) < below:
                found, below = (cuts_NC[some_N[times_N.argmin()]], float(shortest)), float(shortest) * SAME
        return found


def _every(num_parts: int, chunks: int) -> "np.ndarray":
    """All cuts into chunks that have a part."""
    import numpy as np

    inner = np.fromiter(chain.from_iterable(combinations(range(1, num_parts), chunks - 1)), np.int64)
    return np.pad(inner.reshape(-1, chunks - 1), ((0, 0), (1, 1)), constant_values=(0, num_parts))


def _shifts(chunks: int) -> "np.ndarray":
    """What to add to cuts so that one part moves from one chunk to another, and those between pass one on."""
    import numpy as np

    def rows() -> Iterator["np.ndarray"]:
        for length in range(1, chunks):
            for start in range(1, chunks - length + 1):
                run = np.zeros(chunks + 1, np.int64)
                run[start : start + length] = 1
                yield from (-run, run)

    return np.stack(list(rows()))
