"""Where inference gets memories: from a bank (warm start), or encoded when first asked for (cold start).

Tiers, each asked for what the one before does not have: decoded on the device, records in RAM, then the bank, or the
model. A decoded memory takes ten times the bytes of its record or more, and decoding it more time than reading it.
"""

import functools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_m3.memory.cache import MemoryCache
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.cold import ColdMemories
from megatron_m3.memory.record import RecordLayout
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.model.checkpoint import LoadedModel

if TYPE_CHECKING:
    from megatron_m3.references import ReferenceStore

CACHE_BYTES, DECODED_BYTES = 1 << 30, 1 << 28
"""Default budgets: records in RAM, and decoded memories on the device."""
GROUP = 16
"""Memories that are prefetched at a time; a fetch waits for all of a group."""
Ids = np.ndarray | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the attention of this process wants memories."""

    heads: slice = slice(None)
    """The key-value heads; of others nothing is read."""
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(kw_only=True)
class ReadCounts:
    """What a source did so far."""

    decoded_hits: int = 0
    """Memories that were there decoded when they were fetched."""
    record_hits: int = 0
    """Memories whose record was in RAM."""
    misses: int = 0
    """Memories that were read from the bank, or written by the model, while the caller waited."""
    prefetched: int = 0
    """Memories that were brought before they were fetched, if at all."""
    useful: int = 0
    """Of these, those that were fetched then."""
    wait_seconds: float = 0.0
    """In which fetches waited for memories under way."""

    def since(self, before: "ReadCounts") -> "ReadCounts":
        """What was done after ``before``."""
        return ReadCounts(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


class Records(Protocol):
    """Where records come from: a bank, or the model."""

    record: RecordLayout

    @property
    def is_collective(self) -> bool:
        """Whether all tensor-parallel ranks must ask at the same time, even for nothing."""

    def __len__(self) -> int: ...

    def rows(self, ids: np.ndarray, kv_heads: slice) -> np.ndarray:
        """See :meth:`MemoryBank.rows`."""

    def decode_on(self, device: torch.device | str) -> None:
        """See :meth:`MemoryBank.decode_on`."""

    def decode(self, rows: np.ndarray, kv_heads: slice, dtype: torch.dtype) -> ExplicitMemories:
        """See :meth:`MemoryBank.decode`."""


class MemorySource:
    """Serves explicit memories by reference id to one process, and reads ahead what it is told of."""

    def __init__(
        self, records: Records, delivery: Delivery | None = None, *, cache_bytes: int = CACHE_BYTES,
        decoded_bytes: int = DECODED_BYTES,
    ) -> None:
        """Budgets of 0 keep nothing; without any, nothing is read ahead either."""
        self._origin, self.delivery, self.counts = records, delivery or Delivery(), ReadCounts()
        self.records, self.decoded = (MemoryCache(budget, len(records)) for budget in (cache_bytes, decoded_bytes))
        self._held_LG = records.record.held_LG[:, self.delivery.heads]
        records.decode_on(self.delivery.device)
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._under_way: dict[int, Future[None]] = {}
        self._unused: set[int] = set()

    @torch.no_grad()
    def fetch(self, ids: Ids) -> ExplicitMemories:
        """The memories of ``ids``, in that order, as :attr:`delivery` says; ids may repeat.

        Raises:
            M3Error: they cannot be read.
        """
        distinct, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
        self._await(distinct)
        with self._lock:
            here, found = self.decoded.take(distinct)
            used = self._unused.intersection(distinct.tolist())
            self._unused -= used
            self.counts.useful += len(used)
            self.counts.decoded_hits += int(here.sum())
        missing = np.flatnonzero(~here)
        if not len(missing) and len(distinct) and not self._origin.is_collective:
            return self._whole(found, inverse)
        made = self._make(distinct[missing], counted=True)
        if found:
            order = np.argsort(np.concatenate([np.flatnonzero(here), missing]))
            made = tuple(torch.cat(pair)[torch.from_numpy(order)] for pair in zip(found, made, strict=True))
        return self._whole(made, inverse)

    def prefetch(self, ids: Ids) -> None:
        """Begin to bring memories that may be fetched next; returns at once. What fails is tried again by the fetch."""
        tier = self.decoded if self.decoded.budget_bytes else self.records
        if not tier.budget_bytes or self._origin.is_collective:
            return
        with self._lock:
            new = [id for id in np.unique(np.asarray(ids, np.int64)).tolist()
                   if id not in tier and id not in self._under_way]
            self.counts.prefetched += len(new)
            self._unused.update(new)
            for first in range(0, len(new), GROUP):
                group = new[first : first + GROUP]
                future = self._pool.submit(self._bring, np.array(group))
                self._under_way.update(dict.fromkeys(group, future))
                future.add_done_callback(functools.partial(self._arrived, group))

    def _arrived(self, group: list[int], future: Future[None]) -> None:
        with self._lock:
            for id in group:
                self._under_way.pop(id, None)
            if future.cancelled() or future.exception():
                self.counts.prefetched -= len(group)
                self._unused.difference_update(group)

    @torch.no_grad()
    def _bring(self, ids: np.ndarray) -> None:
        if self.decoded.budget_bytes:
            self._make(ids)
        else:
            self._read(ids)

    def _await(self, ids: np.ndarray) -> None:
        """Wait for what of ``ids`` is under way; what has not begun yet is taken back."""
        with self._lock:
            futures = {self._under_way[id] for id in ids.tolist() if id in self._under_way}
        start = time.perf_counter()
        for future in futures:
            if not future.cancel():
                future.exception()
        if futures:
            self.counts.wait_seconds += time.perf_counter() - start

    def _make(self, ids: np.ndarray, *, counted: bool = False) -> tuple[Tensor, ...]:
        """Decoded memories: keys and values of the lists on the device, positions, num_kept; they are kept."""
        rows, wanted = self._read(ids, counted=counted), self.delivery
        memories = self._origin.decode(rows, wanted.heads, wanted.dtype).to(wanted.device, wanted.dtype)
        lists_NCXKD = memories.kv.transpose(2, 3).flatten(1, 2)
        if not self._held_LG.all():
            lists_NCXKD = lists_NCXKD[:, self._held_LG.flatten().to(lists_NCXKD.device)]
        made = (lists_NCXKD, memories.positions, memories.num_kept)
        with self._lock:
            self.decoded.put(ids, made)
        return made

    def _read(self, ids: np.ndarray, *, counted: bool = False) -> np.ndarray:
        """Records, from RAM where they are there."""
        with self._lock:
            here, found = self.records.take(ids)
            if counted:
                self.counts.record_hits += int(here.sum())
                self.counts.misses += int((~here).sum())
        if here.all() and len(ids) and not self._origin.is_collective:
            return found[0].numpy()
        fresh = self._origin.rows(ids[~here], self.delivery.heads)
        with self._lock:
            self.records.put(ids[~here], [torch.from_numpy(fresh)])
        if not found:
            return fresh
        rows = np.empty((len(ids), fresh.shape[1]), np.uint8)
        rows[here], rows[~here] = found[0].numpy(), fresh
        return rows

    def _whole(self, parts: Sequence[Tensor], inverse: np.ndarray) -> ExplicitMemories:
        """Memories with 0 for the heads that hold none."""
        if not np.array_equal(inverse, np.arange(len(parts[0]))):
            parts = [part[torch.from_numpy(inverse)] for part in parts]
        lists_NCXKD, positions, num_kept = parts
        if not self._held_LG.all():
            held = self._held_LG.flatten().to(lists_NCXKD.device)
            every = lists_NCXKD.new_zeros(len(lists_NCXKD), len(held), *lists_NCXKD.shape[2:])
            every[:, held] = lists_NCXKD
            lists_NCXKD = every
        kv = lists_NCXKD.unflatten(1, self._held_LG.shape).transpose(2, 3)
        return ExplicitMemories(kv=kv, positions=positions, num_kept=num_kept)


class WarmSource(MemorySource):
    """Memories of a :class:`MemoryBank`."""


class ColdSource(MemorySource):
    """Memories that the model writes when they are first asked for; they are not prefetched.

    They equal those of a bank with that ``codec``; without one, of a bank with the codec none.
    """

    def __init__(
        self, loaded: LoadedModel, references: "ReferenceStore", delivery: Delivery | None = None, *,
        codec: Codec | None = None, cache_bytes: int = CACHE_BYTES, decoded_bytes: int = DECODED_BYTES,
    ) -> None:
        super().__init__(ColdMemories(loaded, references, codec=codec), delivery, cache_bytes=cache_bytes,
                         decoded_bytes=decoded_bytes)
