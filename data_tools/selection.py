"""Which documents of a corpus are taken: those of a list of ids, or a share drawn by a hash of the id, or both.

An id is taken or not whatever stands around it: neither order nor files nor workers matter, and with the same seed a
larger share holds the smaller one. Ids are told by 128-bit hashes, 16 bytes each, in a file that all processes map.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.documents import Corpus
from data_tools.records import BATCH
from data_tools.shared_work import STAGES, Workers
from megatron_m3.config.checks import check_range
from megatron_m3.config.schema import MAX_SEED
from megatron_m3.errors import ConfigError, DataError
from megatron_m3.manifest import BlockFolder, atomic_path, hash_file, map_block

NOT_FOUND = "not_found.txt"
"""File in the output: the listed ids that no document has."""
SHOWN = 60
"""Characters of an id in an error."""


@dataclass(frozen=True, kw_only=True)
class Select:
    """Documents to take; all by default."""

    ids: str = ""
    """File of document ids, one a line: only these documents are taken."""
    share: float = 1.0
    """Share of the documents, of the listed ones where there is a list, that is taken; drawn by a hash of their ids."""
    seed: int = 0
    """With --select.share: draws other documents."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"select.share={self.share}: must be over 0 and at most 1")
        check_range("select", self, 0, MAX_SEED, "seed")
        if self.seed and self.share == 1:
            raise ConfigError(f"select.seed={self.seed}: changes nothing without --select.share")

    @property
    def chooses(self) -> bool:
        """Whether not all documents are taken."""
        return bool(self.ids) or self.share < 1

    def inputs(self) -> dict[str, str]:
        """What the output was made from besides the corpus.

        Raises:
            DataError: the file of ids is not there, or has none.
        """
        if not self.ids:
            return {}
        path = Path(self.ids)
        if not path.is_file():
            raise DataError(f"select.ids={path}: no such file; give a file of document ids, one a line")
        if next(read_ids(path), None) is None:
            raise DataError(f"select.ids={path}: no id in it; give document ids, one a line")
        return {"selected": str(hash_file(path)["sha256"])}

    def settings(self) -> dict[str, Any]:
        """What shapes the output."""
        return {"select": {"share": self.share, "seed": self.seed}} if self.share < 1 else {}


def read_ids(path: Path) -> Iterator[bytes]:
    """The ids of a file, one a line, as UTF-8."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream):
            if id := (line if number else line.removeprefix(b"\xef\xbb\xbf")).rstrip(b"\r\n"):
                yield id


def digests(ids: Iterator[bytes] | Sequence[bytes]) -> np.ndarray:
    """The 128-bit hash of each id, S16 [N]."""
    return np.frombuffer(b"".join(hashlib.blake2b(id, digest_size=16).digest() for id in ids), "S16")


class Selection:
    """Tells the documents that are taken; made for one job, and sent to its workers."""

    def __init__(self, select: Select, output: Path, job: dict[str, Any]) -> None:
        self.select, self.output = select, output
        self.folder = BlockFolder(output / STAGES / "listed", job | {"kind": f"{job['kind']}, listed ids"})
        self.digest = job["inputs"].get("selected")

    def prepare(self, workers: Workers) -> None:
        """Have one process hash the listed ids, where there are any."""
        if self.select.ids:
            workers.run("reading ids", self.folder, [1], "lists", self.write)

    def write(self, index: int) -> None:
        """Write the hashes of the listed ids, in order, each once.

        Raises:
            DataError: the list is another one than at the beginning.
        """
        listed = np.unique(digests(read_ids(Path(self.select.ids))))
        if hash_file(Path(self.select.ids))["sha256"] != self.digest:
            raise DataError(f"select.ids={self.select.ids}: was changed meanwhile; start again in another folder")
        self.folder.write(index, {"ids": listed.view(np.uint8).reshape(-1, 16)})

    @functools.cached_property
    def listed(self) -> np.ndarray | None:
        """Hashes of the listed ids, S16, ascending; None where there is no list."""
        if not self.select.ids:
            return None
        return map_block(self.folder.checked(0))["ids"].reshape(-1).view("S16")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "listed"}

    def choose(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Which of some documents are taken, bool [N], and the places in the list of those that are listed."""
        names, places = [id.encode() for id in ids], np.zeros(0, np.int64)
        chosen = np.ones(len(ids), bool)
        if self.listed is not None:
            places, chosen = find(self.listed, digests(names))
            places = places[chosen]
        if self.select.share < 1:
            key, limit = str(self.select.seed).encode(), int(self.select.share * 2**64)
            drawn = (hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names)
            chosen &= np.fromiter((int.from_bytes(one, "little") < limit for one in drawn), bool, len(names))
        return chosen, places

    def finish(self, corpus: Corpus, found: Iterable[np.ndarray]) -> dict[str, int]:
        """The counts, when all documents are read; listed ids that none of them has are written to the output.

        Args:
            corpus: with its account.
            found: places in the list of ids that documents have.

        Raises:
            ConfigError: no document was taken.
        """
        if not corpus.selected:
            raise ConfigError(self._why_none(corpus))
        if self.listed is None:
            return {"selected": corpus.selected}
        missing = np.ones(len(self.listed), bool)
        for places in found:
            missing[places] = False
        counts = {"listed": len(missing), "not_found": int(missing.sum()), "selected": corpus.selected}
        if counts["not_found"]:
            with atomic_path(self.output / NOT_FOUND) as path, path.open("wb") as stream:
                for ids in itertools.batched(read_ids(Path(self.select.ids)), BATCH):
                    for place, id in zip(find(self.listed, digests(ids))[0].tolist(), ids, strict=True):
                        if missing[place]:
                            stream.write(id + b"\n")
                            missing[place] = False
        return counts

    def _why_none(self, corpus: Corpus) -> str:
        if self.listed is None:
            return (f"select.share={self.select.share}: draws none of the {corpus.documents:,} documents; give more, "
                    "or another --select.seed")
        first = next(read_ids(Path(self.select.ids))).decode(errors="replace")[:SHOWN]
        what = f"a share of {self.select.share} of the" if self.select.share < 1 else "no document has one of the"
        none = " leaves none" if self.select.share < 1 else ""
        return (f"select.ids={self.select.ids}: {what} {len(self.listed):,} ids{none}; the list has such as {first!r}, "
                f"the corpus such as {corpus.example()!r}")


def find(listed: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place in ``listed`` of each of ``wanted``, int64 [N], and whether it is there, bool [N]."""
    places = np.searchsorted(listed, wanted).clip(max=len(listed) - 1)
    return places, listed[places] == wanted
