"""Recently used memories in RAM, within a budget of bytes."""

from collections import OrderedDict

import torch

from megatron_m3.memory.types import ExplicitMemories


class MemoryCache:
    """Memories by reference id; when the budget is spent the least recently used ones go."""

    def __init__(self, budget_bytes: int) -> None:
        """A budget of 0 keeps nothing."""
        self.budget_bytes, self.bytes = budget_bytes, 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[int, ExplicitMemories] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, id: int) -> ExplicitMemories | None:
        """The memory of one reference (N = 1) if it is here; counts a hit or a miss."""
        found = self._entries.get(id)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(id)
        return found

    def put(self, id: int, memory: ExplicitMemories) -> None:
        """Keep a copy of one reference's memory (N = 1), unless it alone is over the budget."""
        size = _size(memory)
        if size > self.budget_bytes:
            return
        if id in self._entries:
            self.bytes -= _size(self._entries.pop(id))
        while self.bytes + size > self.budget_bytes:
            self.bytes -= _size(self._entries.popitem(last=False)[1])
        self._entries[id] = ExplicitMemories(
            kv=memory.kv.clone(), positions=memory.positions.clone(), num_kept=memory.num_kept.clone()
        )
        self.bytes += size


def _size(memory: ExplicitMemories) -> int:
    tensors: tuple[torch.Tensor, ...] = (memory.kv, memory.positions, memory.num_kept)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
