"""Memories of earlier passes, which chunks read in place of encoding a reference again.

Kept keys are stored after RoPE, and every reference has the same positions, so a memory is read as it was written.

Letters: M references that are encoded, H that are held, K kept tokens, G key-value heads, D head size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

type Kept = tuple[Tensor, Tensor, Tensor]
"""Kept keys and values ``[M, K, G, D]`` of references in one memory layer, and which are real, ``[M, K]``."""


class MemoryTable:
    """Memories by slot in each memory layer of this process; the last slot is for those that find no room."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._layers: dict[int, Kept] = {}

    def write(self, layer: int, slots_M: Tensor, kept: Kept) -> None:
        """Put memories of a layer into slots; -1 is the last one."""
        if layer not in self._layers:
            key, value, valid = (part.new_empty((self._num_slots, *part.shape[1:])) for part in kept)
            self._layers[layer] = key, value, valid
        for rows, part in zip(self._layers[layer], kept, strict=True):
            rows[slots_M] = part.detach()

    def read(self, layer: int, slots_H: Tensor) -> Kept:
        """A copy of the memories of a layer in slots that were written."""
        key, value, valid = (rows[slots_H] for rows in self._layers[layer])
        return key, value, valid


@dataclass(frozen=True, kw_only=True)
class HeldMemories:
    """What one pass of a micro-batch reads of a table and writes to it, once, however often a layer is recomputed."""

    table: MemoryTable
    read_H: Tensor
    """Slots of the held memories that the chunks read."""
    write_M: Tensor
    """Slots for the references that the pass encodes; -1 where there is none."""
    _read: dict[int, Kept | None] = field(default_factory=dict)

    def join(self, layer: int, encoded: Kept | None) -> Kept | None:
        """The encoded memories and after them the held ones, which are constants; None if there are neither."""
        if layer not in self._read:
            # later passes may write to the slots before this one is recomputed
            self._read[layer] = self.table.read(layer, self.read_H) if len(self.read_H) else None
            if encoded is not None:
                self.table.write(layer, self.write_M, encoded)
        held = self._read[layer]
        if encoded is None or held is None:
            return encoded if held is None else held
        key, value, valid = (torch.cat(pair) for pair in zip(encoded, held, strict=True))
        return key, value, valid
