"""Memories that a process holds from step to step, and what each micro-batch reads of them instead of encoding.

What is held and read follows from the references of the replica's micro-batches, their order and the settings alone, so
all its tensor-parallel ranks and pipeline stages, each with its own heads and layers, decide alike without a message.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_m3.config import Config
from megatron_m3.config.reuse import num_slots
from megatron_m3.data.micro_batch import pack_references
from megatron_m3.model.held_memories import MemoryTable

type Batch = dict[str, torch.Tensor]


class SlotIndex:
    """Which references' memories are held, in which slot, and for how long yet; the least recently read come first."""

    def __init__(self, num_slots: int, steps: int) -> None:
        self._free, self._steps = list(range(num_slots)), steps
        self._held: dict[int, tuple[int, int]] = {}
        """Slot, and steps in which it may still be read, by reference."""

    def next_step(self) -> None:
        """Let go of memories that are too old."""
        old, self._held = self._held, {}
        for reference, (slot, steps) in old.items():
            if steps > 1:
                self._held[reference] = slot, steps - 1
            else:
                self._free.append(slot)

    def look_up(self, references: Sequence[int]) -> tuple[list[bool], list[int]]:
        """Whether each of a micro-batch's different references is held, and the slot to read or to write it.

        It is -1 where there is no room, because this micro-batch needs all slots.
        """
        found = [reference in self._held for reference in references]
        for reference, held in zip(references, found, strict=True):
            if held:
                self._held[reference] = self._held.pop(reference)
        needed = set(references)
        for reference, held in zip(references, found, strict=True):
            if held:
                continue
            oldest = next(iter(self._held), None)
            if not self._free and oldest is not None and oldest not in needed:
                self._free.append(self._held.pop(oldest)[0])
            if self._free:
                self._held[reference] = self._free.pop(), self._steps
        return found, [self._held[reference][0] if reference in self._held else -1 for reference in references]


class MemoryStore:
    """The memories that this process holds (``training.reuse_memories``)."""

    def __init__(self, config: Config, data_size: int) -> None:
        self._config, self._data_size = config, data_size
        self._num_kept = 0
        self.drop()

    def drop(self) -> None:
        """Hold nothing: a run that goes on from a checkpoint has nothing either."""
        slots = num_slots(self._config, self._num_kept, self._data_size) if self._num_kept else 1
        self.table, self._index = MemoryTable(slots), SlotIndex(slots - 1, self._config.training.reuse_memories)

    def next_step(self, batches: list[Batch], num_kept: int | None) -> list[Batch]:
        """What a step encodes and reads: its micro-batches, on the CPU, without the references that are held.

        Each has read_slots and write_slots beside, as :func:`megatron_m3.model.gpt.training_forward` takes them. Passes
        must take them in this order. Memories with another number of kept tokens than ``num_kept`` are dropped.
        """
        num_kept = num_kept or self._config.memory.num_kept_tokens
        if num_kept != self._num_kept:
            self._num_kept = num_kept
            self.drop()
        self._index.next_step()
        return [self._without_held(batch) for batch in batches]

    def _without_held(self, batch: Batch) -> Batch:
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        ids = arrays["reference_ids"].ravel()
        there = np.flatnonzero(ids >= 0)
        found, slots = self._index.look_up(ids[there].tolist())
        is_held, slots_M = np.array(found, bool), np.array(slots, np.int64)
        encoded, held = there[~is_held], there[is_held]
        numbers = np.full(ids.size, -1)
        numbers[np.concatenate([encoded, held])] = np.arange(len(there))
        packed = pack_references(arrays, encoded, numbers, self._config, least=0)
        chunks, size = packed["chunk_references"], packed["reference_ids"].size
        packed["chunk_references"] = np.where(chunks < len(encoded), chunks, chunks + size - len(encoded))
        write = np.full(size, -1)
        write[: len(encoded)] = slots_M[~is_held]
        packed |= {"read_slots": slots_M[is_held], "write_slots": write}
        return {name: torch.from_numpy(array) for name, array in packed.items()}
