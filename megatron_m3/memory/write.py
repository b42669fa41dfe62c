"""Writing the blocks of a bank: tokens are read ahead of the model, codes and files are made behind it.

Of each stage one thread: at most ``AHEAD`` groups of tokens wait before the model and ``BEHIND`` groups of memories
after it, so that a device never waits for a disk or for the codec, and memory stays bounded.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_m3.errors import ToldError
from megatron_m3.memory.bank import BankSettings
from megatron_m3.memory.bank_order import BankJob
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.encode import LateMemories
from megatron_m3.memory.work import Crew, OpenBlocks
from megatron_m3.platform.pipeline import Behind, read_ahead
from megatron_m3.platform.progress import Progress
from megatron_m3.references import ReferenceStore

GROUP = 128
"""References that are encoded together."""
AHEAD, BEHIND = 2, 1
GROUPS_IN_RAM = BEHIND + 2
"""Groups of memories at a time: what the model makes, what waits, and what the codec codes."""
LOOK_SECONDS, LOOK_SHARE = 2.0, 0.02
"""Time between two counts of the shards, and the share of a process's time that counting may take."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """References of one block that are encoded together."""

    block: int
    first: int
    """Place of the first in the block."""
    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class _Over:
    """What a group of ranks is told at the end."""

    is_failed: bool


def write_blocks(job: BankJob, crew: Crew, blocks: OpenBlocks, codec: Codec, settings: BankSettings) -> None:
    """Take missing blocks, with the other ranks of a group, until all are written; rank 0 shows the progress of all.

    Raises:
        M3Error: a block could not be written; ToldError: another rank failed.
    """
    if not crew.leads:
        return _follow(job, crew)
    total = sum(len(settings.block(index)) for index in blocks.missing)
    is_failed = True
    try:
        with Progress("bank", total, "references", enabled=crew.rank == 0 and total > 0) as progress:
            shards = _Shards(blocks, codec.to(job.loaded.device), settings, progress)
            with Behind(shards.add, BEHIND) as behind, \
                    contextlib.closing(read_ahead(_groups(job.references, settings, blocks), AHEAD)) as groups:
                for group in groups:
                    crew.tell(group)
                    if group is not None:
                        behind.put((group, job.start(group.tokens, group.lengths)))
                    behind.check()
                    shards.show()
            shards.show(is_over=True)
        is_failed = False
    finally:
        crew.tell(_Over(is_failed))


def _follow(job: BankJob, crew: Crew) -> None:
    """Encode what the first rank of the group encodes."""
    while not isinstance(group := crew.tell(None), _Over):
        if group is not None:
            job.start(group.tokens, group.lengths)
    if group.is_failed:
        raise ToldError("the group's first rank failed")


def _groups(references: ReferenceStore, settings: BankSettings, blocks: Iterable[int | None]) -> Iterator[Group | None]:
    for index in blocks:
        if index is None:
            yield None
            continue
        ids = np.asarray(settings.block(index))
        for first in range(0, len(ids), GROUP):
            tokens, lengths = references.tokens(ids[first : first + GROUP])
            yield Group(block=index, first=first, tokens=tokens, lengths=lengths)


class _Shards:
    """Shards that fill group by group, in order."""

    def __init__(self, blocks: OpenBlocks, codec: Codec, settings: BankSettings, progress: Progress) -> None:
        self.blocks, self.codec, self.settings, self.progress = blocks, codec, settings, progress
        self._shard, self._open = bytearray(), 0
        self._next_look = 0.0

    def add(self, item: tuple[Group, LateMemories]) -> None:
        """Code a group; write the shard when it is full."""
        (group, late), record = item, self.settings.record
        records, size = late.records(self.codec, record), len(self.settings.block(group.block))
        if group.first == 0:
            self._shard = bytearray(size * record.record_bytes)
        self._open = group.first + len(records)
        self._shard[group.first * record.record_bytes : self._open * record.record_bytes] = records.tobytes()
        if self._open == size:
            self.blocks.write(group.block, self._shard)
            self._open = 0

    def show(self, *, is_over: bool = False) -> None:
        """Show what all ranks have written, and what this one has ready for its open shard."""
        now = time.monotonic()
        if not self.progress.enabled or (now < self._next_look and not is_over):
            return
        written = {entry.name for entry in os.scandir(self.blocks.folder.folder)}
        count = self._open + sum(len(self.settings.block(index)) for index in self.blocks.missing
                                 if self.blocks.folder.name(index).replace(".bin", ".json") in written)
        self.progress.advance(max(0, min(count, self.progress.total) - self.progress.count))
        self._next_look = now + max(LOOK_SECONDS, (time.monotonic() - now) / LOOK_SHARE)
