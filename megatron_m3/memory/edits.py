"""An edited bank: a new manifest over old files and a few new ones. No file ever changes, so readers are not disturbed.

- ``edit_HASH/shard_NNNNNN.bin``: records of references that were added or replaced; the settings name their ids.
- ``empty.bin``: one record without tokens, that of every deleted reference.
- ``folded_HASH/shard_NNNNNN.bin``: after a compaction, shards into which edits were folded, in place of the old ones.

HASH is of all that decides the bytes, so a name never stands for two contents.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from megatron_m3.errors import ArtifactError
from megatron_m3.references import parse_ids

EDIT, FOLDED = "edit_", "folded_"
EMPTY = "empty.bin"
FOLDER = re.compile(rf"{EDIT}[0-9a-f]+")
SHARD = re.compile(rf"(?:{FOLDED}[0-9a-f]+/)?shard_(\d+)\.bin")


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard_{index:06d}.bin"


@dataclass(frozen=True, kw_only=True)
class EditFolder:
    """Records of some references, in ascending order of id."""

    name: str
    ids: str
    """As in ``3,7,20-40``."""
    block_size: int
    """References in a shard of the folder."""


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What was edited since a bank was built, or compacted."""

    built: int
    """References in the shards."""
    folders: tuple[EditFolder, ...] = ()
    """Oldest first; where two have a reference, the newer one's record counts."""
    deleted: str = ""
    """Ids, as in ``3,7,20-40``."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Back from a manifest."""
        return cls(**{**fields, "folders": tuple(EditFolder(**one) for one in fields["folders"])})


class Places:
    """Where the record of each reference of a bank lies."""

    def __init__(
        self, address: str, num_references: int, block_size: int, edits: Edits | None, files: Iterable[str]
    ) -> None:
        """``files`` are the bank's.

        Raises:
            ArtifactError: a reference has no record.
        """
        self.block_size, self.edits = block_size, edits or Edits(built=num_references)
        found = {int(match[1]): name for name in files if (match := SHARD.fullmatch(name))}
        self.shards = [found.get(index, "") for index in range(-(-self.edits.built // block_size))]
        """File of each shard."""
        self.folder_ids = [parse_ids(one.ids) for one in self.edits.folders]
        """Ids of each edit's references."""
        self.deleted = parse_ids(self.edits.deleted)
        newest_first = [self.deleted, *self.folder_ids[::-1]]
        self.ids, first = np.unique(np.concatenate(newest_first), return_index=True)
        """Edited and deleted references, ascending."""
        sizes = list(map(len, newest_first))
        self._folder = np.repeat(np.r_[-1, np.arange(len(self.folder_ids))[::-1]], sizes)[first].astype(np.int32)
        self._row = np.concatenate([np.arange(size) for size in sizes])[first]
        new = np.count_nonzero(self.ids >= self.edits.built)
        named = all(self.shards) and all(FOLDER.fullmatch(one.name) for one in self.edits.folders)
        if not named or new != num_references - self.edits.built or (self.ids >= num_references).any():
            raise ArtifactError(f"{address}: the manifest does not say where all records are; build the bank again")

    def __call__(self, id: int) -> tuple[str, int]:
        """The file that holds the record of a reference, and the record's number in it."""
        found = self._find(id)
        if found is None:
            return self.shards[id // self.block_size], id % self.block_size
        folder, row = found
        if folder < 0:
            return EMPTY, 0
        one = self.edits.folders[folder]
        return f"{one.name}/{shard_name(row // one.block_size)}", row % one.block_size

    def block(self, id: int) -> tuple[np.ndarray, int]:
        """Ids of the references in the same file, int64, and the place of this one among them."""
        found = self._find(id)
        if found is None:
            first = id // self.block_size * self.block_size
            return np.arange(first, min(first + self.block_size, self.edits.built)), id - first
        folder, row = found
        if folder < 0:
            return np.array([id]), 0
        size = self.edits.folders[folder].block_size
        first = row // size * size
        return self.folder_ids[folder][first : first + size], row - first

    def _find(self, id: int) -> tuple[int, int] | None:
        """Number of the edit's folder, -1 for a deleted one, and row there; None where it was never edited."""
        if not len(self.ids):
            return None
        place = int(self.ids.searchsorted(id))
        if place == len(self.ids) or self.ids[place] != id:
            return None
        return int(self._folder[place]), int(self._row[place])
