"""The key-value cache of generation: decoding is cache writing, and so is recall (architecture, design 4).

In a memory layer the cache is ``[prefix | memory slots | context]``, in the others ``[prefix | context]``. Keys are
stored rotated, so a recall overwrites the slots and nothing else changes.

Legend of shape suffixes: A choices of heads, B batch, P prefix, M memory slots, T cached tokens, S prompt, H query
heads, G kv heads, Q query heads of one kv head, D head size.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_m3.inference.reading import ChunkMemories
from megatron_m3.model.rope import Rope
from megatron_m3.ops.cached_attention import triton_backend
from megatron_m3.ops.choice import takes_triton
from megatron_m3.ops.rope import rotate


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of a cache; they do not change while it lives."""

    batch: int
    num_layers: int
    num_kv_heads: int
    """Of this process."""
    head_size: int
    prefix_length: int
    context_start: int
    """RoPE position of the context's first token."""
    max_context: int
    """Context tokens that fit."""
    memory_layers: Collection[int] = ()
    memory_heads: Mapping[int, Tensor] = field(default_factory=dict)
    """The kv heads that read memories, bool [G], for memory layers in which not all do."""
    num_slots: int = 0
    """Kept tokens that a chunk reads at most: references per chunk times kept tokens."""
    dtype: torch.dtype
    device: torch.device


class CachePlan:
    """Keys and values of a batch of sequences, and the attention of the one token that each adds in a step."""

    def __init__(self, shape: CacheShape, rope: Rope, backend: str = "torch") -> None:
        """``backend`` is that of the model's attention."""
        self.shape, self.rope, self.backend = shape, rope, backend
        self.is_fixed = takes_triton(backend, shape.head_size)
        """Whether a step is the same launches each time, whatever the sequences' lengths."""
        self.keys, self.values = [], []
        for layer in range(shape.num_layers):
            columns = self._first_context(layer) + shape.max_context
            size = (shape.batch, shape.num_kv_heads, columns, shape.head_size)
            self.keys.append(torch.zeros(size, dtype=shape.dtype, device=shape.device))
            self.values.append(torch.zeros(size, dtype=shape.dtype, device=shape.device))
        columns = shape.prefix_length + shape.num_slots + shape.max_context
        self.mask_BT = torch.full((shape.batch, columns), float("-inf"), dtype=shape.dtype, device=shape.device)
        self.mask_BT[:, : shape.prefix_length] = 0
        self.rows_B = torch.arange(shape.batch, device=shape.device)
        self.lengths = [0] * shape.batch
        self.lengths_B = torch.zeros(shape.batch, dtype=torch.long, device=shape.device)
        self.all_slots_valid = shape.num_slots == 0
        heads = {layer: tuple(heads_G.tolist()) for layer, heads_G in shape.memory_heads.items()}
        distinct = list(dict.fromkeys(heads.values()))
        self.choices = {layer: distinct.index(some) for layer, some in heads.items()}
        self.hidden_AG = ~torch.tensor(distinct, dtype=torch.bool, device=shape.device)

    def _first_context(self, layer: int) -> int:
        return self.shape.prefix_length + (self.shape.num_slots if layer in self.shape.memory_layers else 0)

    def keep(self, layer: int, key_BTGD: Tensor, value_BTGD: Tensor) -> None:
        """Store what a pass over ``[prefix | prompt]`` computed in ``layer``."""
        prefix, first = self.shape.prefix_length, self._first_context(layer)
        for stored_BGTD, new_BTGD in ((self.keys[layer], key_BTGD), (self.values[layer], value_BTGD)):
            new_BGTD = new_BTGD.transpose(1, 2)
            stored_BGTD[:, :, :prefix] = new_BGTD[:, :, :prefix]
            stored_BGTD[:, :, first : first + new_BGTD.shape[2] - prefix] = new_BGTD[:, :, prefix:]

    def begin(self, lengths: Sequence[int]) -> None:
        """Say how many context tokens of each sequence the cache now holds; what lies behind them is padding."""
        self.lengths = list(lengths)
        self.lengths_B.copy_(torch.tensor(self.lengths))
        first = self.shape.prefix_length + self.shape.num_slots
        columns = torch.arange(self.shape.max_context, device=self.shape.device)
        self.mask_BT[:, first:].masked_fill_(columns < self.lengths_B[:, None], 0)

    def recall(self, memories: ChunkMemories, rows: Sequence[int] | None = None) -> None:
        """Overwrite the memory slots of the sequences ``rows`` (all by default) with ``memories`` (C = 1)."""
        rows_B = slice(None) if rows is None else torch.tensor(rows, device=self.shape.device)
        slots = slice(self.shape.prefix_length, self.shape.prefix_length + self.shape.num_slots)
        for layer in self.shape.memory_layers:
            key_BMGD, value_BMGD = memories.key_values(layer)[:, :, 0].to(self.shape.dtype)
            self.keys[layer][rows_B, :, slots] = key_BMGD.transpose(1, 2)
            self.values[layer][rows_B, :, slots] = value_BMGD.transpose(1, 2)
        valid_BM = memories.valid_slots[:, 0]
        shown_BM = torch.zeros(valid_BM.shape, dtype=self.shape.dtype, device=self.shape.device)
        self.mask_BT[rows_B, slots] = shown_BM.masked_fill_(~valid_BM, float("-inf"))
        self._look_at_slots()

    def _look_at_slots(self) -> None:
        if self.is_fixed:  # the kernel looks for itself, and nobody waits for the device
            return
        first = self.shape.prefix_length
        self.all_slots_valid = not bool(torch.isinf(self.mask_BT[:, first : first + self.shape.num_slots]).any())

    def join(self, other: "CachePlan") -> None:
        """Take the sequences of another cache of the same model behind one's own."""
        assert other.shape.num_slots == self.shape.num_slots, "caches of different models"
        widest = max(self.shape.max_context, other.shape.max_context)
        for layer in range(self.shape.num_layers):
            columns = self._first_context(layer) + widest
            self.keys[layer] = _stacked(self.keys[layer], other.keys[layer], 2, columns, 0.0)
            self.values[layer] = _stacked(self.values[layer], other.values[layer], 2, columns, 0.0)
        columns = self.shape.prefix_length + self.shape.num_slots + widest
        self.mask_BT = _stacked(self.mask_BT, other.mask_BT, 1, columns, float("-inf"))
        self._look_at_slots()
        self._have(self.lengths + other.lengths, widest)

    def only(self, rows: Sequence[int], max_context: int) -> None:
        """Forget all sequences but ``rows``, and context columns beyond ``max_context``."""
        rows_B = torch.tensor(rows, device=self.shape.device)
        for layer in range(self.shape.num_layers):
            columns = self._first_context(layer) + max_context
            self.keys[layer] = self.keys[layer][:, :, :columns][rows_B]
            self.values[layer] = self.values[layer][:, :, :columns][rows_B]
        self.mask_BT = self.mask_BT[:, : self.shape.prefix_length + self.shape.num_slots + max_context][rows_B]
        self._look_at_slots()
        self._have([self.lengths[row] for row in rows], max_context)

    def _have(self, lengths: list[int], max_context: int) -> None:
        self.shape = replace(self.shape, batch=len(lengths), max_context=max_context)
        self.rows_B = torch.arange(len(lengths), device=self.shape.device)
        self.lengths, self.lengths_B = lengths, torch.tensor(lengths, device=self.shape.device)

    def step(self) -> None:
        """Make room for one more token of every sequence; call it before each forward pass of one token."""
        self.count_step()
        self.step_on_device()
        if not self.is_fixed:
            self.memory_mask, self.plain_mask = self._masks()
            self.masks_ABG1T = self._masks_by_heads() if self.choices else ()

    def count_step(self) -> None:
        """The part of :meth:`step` that the host does."""
        self.lengths = [length + 1 for length in self.lengths]

    def step_on_device(self) -> None:
        """The part that the device does: with fixed steps the same operations on the same tensors."""
        self.new_B = self.lengths_B.clone()
        self.lengths_B += 1
        self.table = self.rope.table((self.new_B + self.shape.context_start)[None], self.shape.dtype)
        first = self.shape.prefix_length + self.shape.num_slots
        self.mask_BT.scatter_(1, (first + self.new_B)[:, None], 0)

    @property
    def _same_length(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def _masks(self) -> tuple[Tensor | None, Tensor | None]:
        """What to add to the scores of one step, [B, 1, 1, T], in memory layers and in others; None adds nothing."""
        prefix, slots, longest = self.shape.prefix_length, self.shape.num_slots, max(self.lengths)
        self.used_B11T = self.mask_BT[:, None, None, : prefix + slots + longest]
        memory = None if self._same_length and self.all_slots_valid else self.used_B11T
        if self._same_length or not slots:
            return memory, None if self._same_length else self.used_B11T
        return memory, torch.cat([self.used_B11T[..., :prefix], self.used_B11T[..., prefix + slots :]], -1)

    def _mask(self, layer: int) -> Tensor | None:
        """What one step adds to the scores in ``layer``, [B, 1 or G, 1, T]; None adds nothing."""
        if layer not in self.shape.memory_layers:
            return self.plain_mask
        return self.masks_ABG1T[self.choices[layer]] if layer in self.choices else self.memory_mask

    def _masks_by_heads(self) -> Tensor:
        """The mask of each choice of heads that read memories, for layers in which not all do."""
        prefix, slots = self.shape.prefix_length, self.shape.num_slots
        masks_ABG1T = self.used_B11T.repeat(*self.hidden_AG.shape[:1], 1, self.shape.num_kv_heads, 1, 1)
        shown = masks_ABG1T[..., prefix : prefix + slots]
        shown.masked_fill_(self.hidden_AG[:, None, :, None, None], float("-inf"))
        return masks_ABG1T

    def _add(self, stored_BGTD: Tensor, layer: int, new_BGD: Tensor) -> None:
        """Store what the new token of every sequence has in ``layer``."""
        first = self._first_context(layer)
        if self._same_length:
            stored_BGTD[:, :, first + self.lengths[0] - 1] = new_BGD
        else:
            stored_BGTD[self.rows_B, :, first + self.new_B] = new_BGD

    def attend(self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """Store the new token of every sequence and attend from it to all that is cached, [1, B, H, D]; S is 1."""
        if self.is_fixed:
            return self._attend_at_once(layer, query_SBHD[0], key_SBGD[0], value_SBGD[0])[None]
        query_BHD = rotate(query_SBHD, self.table, self.backend)[0]
        columns = self._first_context(layer) + max(self.lengths)
        self._add(self.keys[layer], layer, rotate(key_SBGD, self.table, self.backend)[0])
        self._add(self.values[layer], layer, value_SBGD[0])
        out_BGQD = torch.nn.functional.scaled_dot_product_attention(
            query_BHD.unflatten(1, (self.shape.num_kv_heads, -1)),
            self.keys[layer][:, :, :columns],
            self.values[layer][:, :, :columns],
            attn_mask=self._mask(layer),
        )
        return out_BGQD.flatten(1, 2)[None]

    def _attend_at_once(self, layer: int, query_BHD: Tensor, key_BGD: Tensor, value_BGD: Tensor) -> Tensor:
        prefix, mask_BM, hidden_G = self.shape.prefix_length, None, None
        if layer in self.shape.memory_layers:
            mask_BM = self.mask_BT[:, prefix : prefix + self.shape.num_slots]
            hidden_G = self.hidden_AG[self.choices[layer]] if layer in self.choices else None
        table = self.table[0][0], self.table[1][0]
        return triton_backend.cached_attention(
            query_BHD, key_BGD, value_BGD, self.keys[layer], self.values[layer], table, self.new_B,
            prefix_length=prefix, mask_BM=mask_BM, hidden_G=hidden_G)


def _stacked(first: Tensor, second: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """The rows of two tensors, with ``fill`` behind their ends along ``dim``, up to ``size``."""
    shape = list(first.shape)
    shape[0], shape[dim] = len(first) + len(second), size
    both = first.new_full(shape, fill)
    for rows, part in ((both[: len(first)], first), (both[len(first) :], second)):
        rows.narrow(dim, 0, part.shape[dim]).copy_(part)
    return both
