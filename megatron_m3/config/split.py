"""Which layers lie on which pipeline stage, so that the slowest stage is as fast as can be.

Layers up to the last memory layer also see the references, about three times the tokens, and the output projection may
weigh as much as many layers. What is split is the row of parts ``[embedding, layers..., output projection]``: each
chunk takes one run of parts and at least one of them, since one without would only pass on what it gets. So only the
first and the last chunk may go without layers; numbers that a user gives may leave any chunk without.
"""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from megatron_m3.config.flops import head_flops, layer_flops
from megatron_m3.config.schema import Config
from megatron_m3.config.split_search import SplitSearch

ROUNDS = 4
"""Micro-batches for each stage in the step that an interleaved split is judged by."""
Cost = tuple[float, float]
"""Work of a part or a chunk on one sequence: forward, backward."""


def stage_layers(config: Config) -> tuple[int, ...]:
    """Layers of each model chunk in the order of the layers: ``parallel.split``, or the planned one.

    Chunk ``c`` lies on stage ``c % parallel.pipeline``. The same on every process, and for any number of them.
    """
    parallel = config.parallel
    given = parallel.split_layers()
    if given is not None:
        return given
    # a first stage of frozen layers alone would have nothing to train
    frozen = config.training.frozen_layers
    chunks = parallel.pipeline * parallel.interleave
    cuts = _plan(tuple(part_costs(config)), parallel.pipeline, chunks, frozen + 2 if frozen and chunks > 1 else 1)
    return _layers(cuts)


def even_layers(num_layers: int, chunks: int) -> tuple[int, ...]:
    """The split with as many layers everywhere, the first chunks having one more where they do not divide."""
    each, more = divmod(num_layers, chunks)
    return tuple(each + (chunk < more) for chunk in range(chunks))


def part_costs(config: Config) -> list[Cost]:
    """FLOPs of embedding, each layer and output projection on one sequence; the prefix is not counted.

    With ``parallel.recompute`` the backward pass of a layer has its forward pass again, but for references that have
    no backward pass.
    """
    again = config.parallel.recompute
    layers = [(layer.forward, layer.backward + again * layer.recomputed) for layer in layer_flops(config)]
    return [(0.0, 0.0), *layers, head_flops(config)]


def chunk_costs(config: Config, layers: Sequence[int]) -> list[Cost]:
    """FLOPs of each model chunk on one sequence, if the chunks have ``layers``."""
    return _chunk_costs(part_costs(config), _cuts(layers))


def _cuts(layers: Sequence[int]) -> tuple[int, ...]:
    """First part of each chunk, and the number of parts; embedding and output projection are parts."""
    ends = list(accumulate(layers))
    return 0, *(end + 1 for end in ends[:-1]), ends[-1] + 2


def _layers(cuts: Sequence[int]) -> tuple[int, ...]:
    sizes = [end - start for start, end in pairwise(cuts)]
    sizes[0] -= 1
    sizes[-1] -= 1
    return tuple(sizes)


def _chunk_costs(parts: Sequence[Cost], cuts: Sequence[int]) -> list[Cost]:
    return [
        (sum(forward for forward, _ in parts[start:end]), sum(backward for _, backward in parts[start:end]))
        for start, end in pairwise(cuts)
    ]


@functools.lru_cache(maxsize=64)
def _plan(parts: tuple[Cost, ...], stages: int, chunks: int, first: int) -> tuple[int, ...]:
    """Cuts of the best split whose first chunk has at least ``first`` parts.

    On one chunk a stage it is the exact one. On several, where the order of the passes counts too, the best of all if
    there are not too many, else one that no shift of a run of cuts by one makes faster, by the schedule's time.
    """
    balanced = _balance([sum(part) for part in parts], chunks, first)
    if chunks == stages:
        return balanced
    even = _cuts(even_layers(len(parts) - 2, chunks))
    starts = [balanced, even] if _allowed(even, first) else [balanced]
    return SplitSearch(parts, stages, ROUNDS * stages, first).best(starts)


def _allowed(cuts: Sequence[int], first: int) -> bool:
    """Whether every chunk has a part, and the first one ``first`` of them."""
    return cuts[1] >= first and all(low < high for low, high in pairwise(cuts))


def _balance(costs: Sequence[float], chunks: int, first: int) -> tuple[int, ...]:
    """Cuts with the smallest possible largest chunk; among these, chunks as alike as can be (least squares)."""
    sums = [0.0, *accumulate(costs)]

    def best(join: Callable[[float, float], float], bound: float) -> tuple[float, tuple[int, ...]]:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
        for chunk in range(chunks):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for start, (value, cuts) in reached.items():
                for end in range(start + (first if chunk == 0 else 1), len(sums)):
                    cost = sums[end] - sums[start]
                    if cost > bound:
                        break
                    joined = join(value, cost)
                    if end not in after or joined < after[end][0]:
                        after[end] = joined, (*cuts, end)
            reached = after
        return reached[len(costs)]

    largest, _ = best(max, math.inf)
    return best(lambda total, cost: total + cost**2, largest * (1 + 1e-9))[1]
