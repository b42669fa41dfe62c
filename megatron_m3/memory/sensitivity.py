"""What an error in a memory costs where it is read: the weights by which a codec shares its bits.

A wrong key changes the score of its token by ``q . dk / sqrt(D)`` for every query q that reads it, a wrong value
changes the output by ``W_o dv``. Scores move the output by as much as values differ, so both costs have one unit.

Letters: L memory layers, G key-value heads, D head size, R query heads of a key-value head, N vectors, E hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_m3.config import Config
from megatron_m3.memory.encode import EncodePlan, gather_heads, run_encoding
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.rope import Rope
from megatron_m3.ops.rope import rotate

DISTANCES = 24
"""Distances between a kept token and its reader over which the queries' second moments are averaged."""
MOST_REFERENCES = 128
"""References whose queries stand for those of readers."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Second moments of a model's readers, for vectors whose keys are turned back to the start of their reference."""

    frequency: Tensor
    """float64 [D/2]: angle of each pair of a key by which one position turns it."""
    query_LGDD: Tensor
    """Mean of ``q q^T / D`` over queries, turned by their distance from the start of a reference."""
    value_LGDD: Tensor
    """Sum of ``W_o^T W_o`` over the query heads of a key-value head."""


@torch.no_grad()
def measure_sensitivity(
    loaded: LoadedModel, references: Sequence[Sequence[int]] | Sequence[np.ndarray]
) -> Sensitivity:
    """From the output projections, and the queries of some references' own tokens.

    Whole (all key-value heads) on every tensor-parallel rank; they call it together.
    """
    some = references[:: -(-len(references) // MOST_REFERENCES)]
    longest = max(map(len, some))
    tokens_NT = torch.tensor([[*map(int, one), *[0] * (longest - len(one))] for one in some])
    lengths_N = torch.tensor([len(one) for one in some], device=loaded.device)
    plan = _QueryMoments(loaded.config, len(loaded.prefix_ids), lengths_N)
    run_encoding(loaded, tokens_NT, plan)
    return Sensitivity(
        frequency=Rope.of(loaded.config.model).frequency.cpu(),
        query_LGDD=_turned(gather_heads(torch.stack(plan.moments), 1).cpu(), loaded.config),
        value_LGDD=gather_heads(torch.stack([_output_moments(loaded, layer) for layer in loaded.config.memory_layers]),
                                1).cpu(),
    )


class _QueryMoments(EncodePlan):
    """Collects second moments of queries before rotation instead of keys and values."""

    def __init__(self, config: Config, prefix_length: int, lengths_N: Tensor) -> None:
        super().__init__([config], prefix_length, lengths_N)
        self.moments: list[Tensor] = []

    def keep(self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, *rest: Tensor) -> None:
        """See :meth:`EncodePlan.keep`."""
        if layer not in self.configs[0].memory_layers:
            return
        query_NTHD = query_SBHD[self.prefix_length :].transpose(0, 1).float()
        valid_NT = torch.arange(query_NTHD.shape[1], device=query_NTHD.device) < self.lengths_N[:, None]
        query_NGRD = query_NTHD[valid_NT].unflatten(1, (key_SBGD.shape[2], -1))
        count = query_NGRD.shape[0] * query_NGRD.shape[2]
        self.moments.append(torch.einsum("ngrd,ngre->gde", query_NGRD, query_NGRD) / count)


def _turned(moments_LGDD: Tensor, config: Config) -> Tensor:
    """Query moments averaged over the distances at which a reference is read, over the head size."""
    most = config.memory.reference_length + 2 * config.memory.chunk_length
    distances = torch.linspace(1, most, DISTANCES).round()
    table = Rope.of(config.model).table(distances, torch.float32)
    size = config.model.head_size
    # row d of a turn is the unit vector d turned, so that q @ turn is q turned
    turn_TDD = rotate(torch.eye(size).expand(DISTANCES, size, size), table)
    turned = torch.einsum("tda,lgde,teb->lgab", turn_TDD, moments_LGDD, turn_TDD)
    return turned / DISTANCES / size


def _output_moments(loaded: LoadedModel, layer: int) -> Tensor:
    size = loaded.config.model.head_size
    heads = loaded.model.decoder.layers[layer].self_attention.num_query_groups_per_partition
    weight_EHD = loaded.model.decoder.layers[layer].self_attention.linear_proj.weight.float()
    weight_EGRD = weight_EHD.unflatten(1, (heads, -1, size))
    return torch.einsum("egrd,egrf->gdf", weight_EGRD, weight_EGRD)
