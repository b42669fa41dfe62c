"""What was used recently, by reference id, within a budget of bytes."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class MemoryCache:
    """Rows of some tensors by reference id; when the budget is spent, those least recently used go.

    A row is what is kept of one reference; all rows have the same bytes. They lie in tensors of their own, so that
    nothing larger is kept alive, on the device of the first that are kept. Not safe for several threads.
    """

    def __init__(self, budget_bytes: int, most: int) -> None:
        """A budget of 0 keeps nothing; there are at most ``most`` references."""
        self.budget_bytes, self.most, self.row_bytes = budget_bytes, most, 0
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._free: list[int] = []
        self._tensors: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, id: int) -> bool:
        return id in self._slots

    @property
    def bytes(self) -> int:
        """Held by the rows that are here."""
        return len(self) * self.row_bytes

    def take(self, ids: np.ndarray) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        """Which of ``ids`` are here, bool [N], and copies of their rows; none at all if none is."""
        here = np.array([id in self._slots for id in ids.tolist()], bool)
        slots = []
        for id in ids[here].tolist():
            self._slots.move_to_end(id)
            slots.append(self._slots[id])
        return here, tuple(tensor[slots] for tensor in self._tensors) if slots else ()

    def put(self, ids: np.ndarray, rows: Sequence[Tensor]) -> None:
        """Keep copies of the rows of distinct ``ids``, as many of the last ones as the budget has room for."""
        self._prepare(rows)
        first = max(0, len(ids) - self._room)
        slots = [self._slot(id) for id in ids[first:].tolist()]
        if slots:
            for tensor, new in zip(self._tensors, rows, strict=True):
                tensor[slots] = new[first:]

    def _prepare(self, rows: Sequence[Tensor]) -> None:
        if not self._tensors:
            self.row_bytes = sum(row.shape[1:].numel() * row.element_size() for row in rows)
            self._room = min(self.budget_bytes // self.row_bytes, self.most)
            self._free = list(range(self._room))[::-1]
            with torch.inference_mode(False):  # what one thread keeps, others overwrite
                self._tensors = tuple(row.new_empty((self._room, *row.shape[1:])) for row in rows)

    def _slot(self, id: int) -> int:
        if id in self._slots:
            self._slots.move_to_end(id)
            return self._slots[id]
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        self._slots[id] = slot
        return slot
