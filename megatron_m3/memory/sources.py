"""Where inference gets memories: from a bank (warm start), or encoded when first asked for (cold start)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_m3.memory.bank import MemoryBank
from megatron_m3.memory.cache import MemoryCache
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.encode import encode_references
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.model.checkpoint import LoadedModel

if TYPE_CHECKING:
    from megatron_m3.references import ReferenceStore

CACHE_BYTES = 1 << 30
Ids = np.ndarray | Sequence[int]


class MemorySource(Protocol):
    """Serves explicit memories by reference id."""

    cache: MemoryCache

    def fetch(self, ids: Ids) -> ExplicitMemories:
        """The memories of ``ids``, in that order, all heads; ids may repeat."""


class WarmSource:
    """Memories of a bank; recently read ones stay in RAM, decoded."""

    def __init__(self, bank: MemoryBank, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.bank, self.cache = bank, MemoryCache(cache_bytes)

    def fetch(self, ids: Ids) -> ExplicitMemories:
        """See :class:`MemorySource`."""
        return _fetch(self.cache, ids, self.bank.read)


class ColdSource:
    """Memories that the model writes when they are first asked for, and that stay while the cache has room.

    With ``codec`` they pass through it, and so equal those of a bank with that codec.
    """

    def __init__(
        self, loaded: LoadedModel, references: "ReferenceStore", *, codec: Codec | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.loaded, self.references, self.codec, self.cache = loaded, references, codec, MemoryCache(cache_bytes)

    def fetch(self, ids: Ids) -> ExplicitMemories:
        """See :class:`MemorySource`."""
        return _fetch(self.cache, ids, self._encode)

    def _encode(self, ids: np.ndarray) -> ExplicitMemories:
        memories = encode_references(self.loaded, *self.references.tokens(ids))
        return self.codec.round_trip(memories) if self.codec else memories


def _fetch(cache: MemoryCache, ids: Ids, make: Callable[[np.ndarray], ExplicitMemories]) -> ExplicitMemories:
    """Memories from the cache; the missing ones, each once and all together, from ``make``."""
    distinct, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    found = {int(id): cache.get(int(id)) for id in distinct}
    missing = np.array([id for id, memory in found.items() if memory is None], np.int64)
    if len(missing) or not found:
        made = make(missing)
        if not found:
            return made
        for row, id in enumerate(missing.tolist()):
            found[id] = made[row : row + 1]
            cache.put(id, found[id])  # type: ignore[arg-type]
    whole = ExplicitMemories.concatenate([found[id] for id in distinct.tolist()])  # type: ignore[misc]
    return whole if np.array_equal(inverse, np.arange(len(whole))) else whole[inverse.tolist()]
