"""One pass over ``[prefix | context]`` in which every chunk of the context reads its own memories (section 3.1).

Legend of shape suffixes: T prefix and context, S sequence, B batch, C chunks, R references of a chunk, K kept tokens,
M = R * K memory slots, N memories, Lm memory layers, P prefix, H query heads, G kv heads, D head size.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_m3.model.rope import Rope
from megatron_m3.ops.memory_attention import get_backend
from megatron_m3.ops.rope import Table, rotate

if TYPE_CHECKING:
    from megatron_m3.memory import ExplicitMemories

KeepKeyValues = Callable[[int, Tensor, Tensor], None]
type PrefixKeyValues = Sequence[tuple[Tensor, Tensor]]
"""Rotated keys and values of the prefix in each layer, [P, G, D]."""


@dataclass(frozen=True, kw_only=True)
class ChunkMemories:
    """Which explicit memories each chunk of each sequence reads."""

    memories: "ExplicitMemories"
    """Distinct memories, N of them."""
    rows_BCR: Tensor
    """Row of ``memories`` for each reference of each chunk; anything where ``valid_BCR`` is False."""
    valid_BCR: Tensor
    """Whether there is such a reference."""
    layers: Mapping[int, int]
    """The memory layers: from a layer's number to its place in ``memories``."""
    heads: slice
    """The kv heads of this process among those of ``memories``."""
    memory_heads: Mapping[int, Tensor] = field(default_factory=dict)
    """The kv heads of this process that read memories, bool [G], for memory layers in which not all do."""

    @property
    def num_slots(self) -> int:
        """M: kept tokens that a chunk reads at most."""
        return self.rows_BCR.shape[2] * self.memories.kv.shape[4]

    @functools.cached_property
    def valid_slots(self) -> Tensor:
        """Which memory slots hold a kept token, bool [B, C, M]."""
        slots_K = torch.arange(self.memories.kv.shape[4], device=self.rows_BCR.device)
        kept_N = self.memories.num_kept.to(self.rows_BCR.device)
        kept_BCR = kept_N[self.rows_BCR] if len(kept_N) else torch.zeros_like(self.rows_BCR)
        return ((slots_K < kept_BCR[..., None]) & self.valid_BCR[..., None]).flatten(2)

    def key_values(self, layer: int) -> Tensor:
        """Keys (rotated) and values of one memory layer, [2, B, C, M, G, D]; zero where there is no kept token."""
        kv_NXGKD = self.memories.kv[:, self.layers[layer], :, self.heads].to(self.rows_BCR.device)
        B, C, R = self.rows_BCR.shape
        _, X, G, K, D = kv_NXGKD.shape
        if not len(kv_NXGKD):
            return kv_NXGKD.new_zeros(X, B, C, R * K, G, D)
        kv_XNKGD = kv_NXGKD.permute(1, 0, 3, 2, 4).contiguous()
        kv_XBCMGD = kv_XNKGD.index_select(1, self.rows_BCR.flatten()).view(X, B, C, R * K, G, D)
        return kv_XBCMGD if self._all_valid else kv_XBCMGD.masked_fill_(~self.valid_slots[None, ..., None, None], 0)

    @functools.cached_property
    def _all_valid(self) -> bool:
        return bool(self.valid_slots.all())

    def valid_in(self, layer: int) -> Tensor:
        """Which slots of a memory layer are read, [B, C, M], or [B, C, M, G] where its heads differ."""
        if layer not in self.memory_heads:
            return self.valid_slots
        return self.valid_slots[..., None] & self.memory_heads[layer].to(self.valid_slots.device)

    def chunk(self, index_B: Tensor) -> "ChunkMemories":
        """The memories of one chunk of each sequence, as a :class:`ChunkMemories` with C = 1."""
        rows_B = torch.arange(len(index_B), device=self.rows_BCR.device)
        return ChunkMemories(
            memories=self.memories,
            rows_BCR=self.rows_BCR[rows_B, index_B][:, None],
            valid_BCR=self.valid_BCR[rows_B, index_B][:, None],
            layers=self.layers,
            heads=self.heads,
            memory_heads=self.memory_heads,
        )


class ReadingPlan:
    """Attention of one pass: memory layers read memories, all layers are causal over the prefix and the context.

    Sequences of different lengths are padded on the right: what stands after a token never reaches it.
    """

    def __init__(
        self,
        rope: Rope,
        positions_T: Tensor,
        *,
        prefix_length: int = 0,
        chunk_length: int = 1,
        prefix: PrefixKeyValues = (),
        memories: ChunkMemories | None = None,
        keep: KeepKeyValues | None = None,
        backend: str = "torch",
    ) -> None:
        """``keep(layer, key_BTGD, value_BTGD)`` receives every layer's rotated keys and its values, for a cache.

        With ``prefix``, which :func:`read_prefix` gives, the pass and ``positions_T`` are of the context alone, and in
        every layer each chunk reads the prefix as it does memories.
        """
        self.rope, self.positions_T1 = rope, positions_T[:, None]
        self.backend_name, self.backend = backend, get_backend(backend)
        self.prefix_length, self.chunk_length = prefix_length, chunk_length
        self.prefix, self.memories, self.keep = prefix, memories, keep
        self.table: Table | None = None

    def attend(self, layer: int, query_TBHD: Tensor, key_TBGD: Tensor, value_TBGD: Tensor) -> Tensor:
        """Attention output of ``layer`` for every position of the pass, [T, B, H, D]."""
        if self.table is None:
            self.table = self.rope.table(self.positions_T1, query_TBHD.dtype)
        query_TBHD, key_TBGD = (rotate(part, self.table, self.backend_name) for part in (query_TBHD, key_TBGD))
        query_BTHD, key_BTGD, value_BTGD = (part.transpose(0, 1) for part in (query_TBHD, key_TBGD, value_TBGD))
        if self.keep is not None:
            self.keep(layer, *self._behind_prefix(layer, (key_BTGD, value_BTGD)))
        return self._read(layer, query_BTHD, key_BTGD, value_BTGD).transpose(0, 1)

    def _behind_prefix(self, layer: int, parts: Iterable[Tensor]) -> Iterable[Tensor]:
        """Keys and values ``[..., T, G, D]`` behind those of the prefix, if the pass is not of it."""
        if not self.prefix:
            return parts
        return [torch.cat([known_PGD.expand(*part.shape[:-3], -1, -1, -1), part], -3)
                for known_PGD, part in zip(self.prefix[layer], parts, strict=True)]

    def _read(self, layer: int, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Tensor:
        slots: Iterable[Tensor]
        if self.memories is not None and layer in self.memories.layers:
            slots, valid_BCM = self.memories.key_values(layer).to(query_BTHD.dtype), self.memories.valid_in(layer)
        elif self.prefix:
            slots = key_BTGD[:, None, :0], value_BTGD[:, None, :0]
            valid_BCM = torch.ones(len(key_BTGD), 1, 0, dtype=torch.bool, device=key_BTGD.device)
        else:
            return self.backend.causal_attention(query_BTHD, key_BTGD, value_BTGD)
        if self.prefix:
            B, C, _, *heads = valid_BCM.shape
            valid_BCM = torch.cat([valid_BCM.new_ones(B, C, self.prefix_length, *heads), valid_BCM], 2)
        return self.backend.memory_attention(
            query_BTHD,
            key_BTGD,
            value_BTGD,
            *self._behind_prefix(layer, slots),
            valid_BCM,
            prefix_length=0 if self.prefix else self.prefix_length,
            chunk_length=self.chunk_length,
            window=1,
        )


def read_prefix(
    decoder: Callable[[Tensor, ReadingPlan, Tensor], Tensor], prefix_ids: Sequence[int], rope: Rope,
    device: torch.device, backend: str,
) -> PrefixKeyValues:
    """What the prefix, which attends to itself alone, has before any context."""
    found: list[tuple[Tensor, Tensor]] = []
    if prefix_ids:
        tokens_P = torch.tensor(prefix_ids, device=device)
        plan = ReadingPlan(
            rope, torch.arange(len(tokens_P), device=device), backend=backend,
            keep=lambda _, key_BTGD, value_BTGD: found.append((key_BTGD[0].clone(), value_BTGD[0].clone())))
        decoder(tokens_P[None], plan, torch.zeros(1, dtype=torch.long, device=device))
    return found
