"""The corpus: documents of files, in order. What cannot be used is counted and set aside, with its file and line.

It is made of files that :mod:`data_tools.records` reads, and of folders made by `m3 data collect`, `filter` or
`deduplicate`: their blocks.
"""

import contextlib
import copy
import functools
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from data_tools.pieces import LineCount, make_plan, parts_of_names, settle
from data_tools.records import SUFFIXES, BadRecordError, Document, Piece, in_batches, read_records
from megatron_m3.errors import DataError
from megatron_m3.manifest import Manifest, atomic_path, check_files, hash_file, hash_json, read_manifest

if TYPE_CHECKING:
    import numpy as np

    from data_tools.selection import Selection

SKIPPED = "skipped.jsonl"
NAMED = 3
"""Files that an error names."""


def find_files(names: Sequence[str]) -> list[Path]:
    """The corpus files that ``names`` give: files, or folders that stand for their files in order of name.

    Raises:
        DataError: one does not exist, is of an unknown type, or there is none.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir() and (made := _artifact(path)):
            files += [path / file for file in made.files if file.endswith(SUFFIXES)]
        elif path.is_dir():
            there = sorted(one for one in path.iterdir() if one.name != SKIPPED and not one.is_dir())
            files += (found := [one for one in there if one.name.endswith(SUFFIXES)])
            if found and (others := [one.name for one in there if not one.name.endswith(SUFFIXES)]):
                print(f"{path}: {len(others):,} files of unknown types are not read, such as {others[0]!r}",
                      file=sys.stderr)
        elif not path.is_file():
            raise DataError(f"{path}: no such file")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown type; give one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise DataError(f"{', '.join(names) or 'input'}: no corpus file there; give {', '.join(SUFFIXES)}")
    return files


def _artifact(folder: Path) -> Manifest | None:
    """The manifest of an artifact that texts can be read from, documents or texts; None where the folder is none.

    Raises:
        ArtifactError: it is an unfinished, damaged or other one.
    """
    for name in ("manifest.json", "job.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / name).read_text())
            made = found.get("job", found) if isinstance(found, dict) else {}
            if isinstance(made, dict) and {"kind", "schema"} <= made.keys():
                return read_manifest(folder, "texts" if made["kind"] == "texts" else "documents", 1)
    return None


class Skipped:
    """Records that were set aside: a JSON line each in a file, only their counts in memory."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """``stream``: an empty text file to write and read; by default one that vanishes."""
        self.reasons: Counter[str] = Counter()
        self._stream = stream

    def __getstate__(self) -> dict[str, Any]:
        return {"reasons": Counter(), "_stream": None}

    def __len__(self) -> int:
        return self.reasons.total()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.lines())

    def add(self, file: Path, line: int, reason: str) -> None:
        """Set a record aside."""
        self.reasons[reason] += 1
        if self._stream is None:
            self._stream = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._stream.write(json.dumps({"file": str(file), "line": line, "reason": reason}) + "\n")

    def lines(self) -> Iterator[str]:
        """The lines, in order."""
        if self._stream is not None:
            self._stream.seek(0)
            yield from self._stream

    def clear(self) -> None:
        """Forget all."""
        self.reasons.clear()
        if self._stream is not None:
            self._stream.seek(0)
            self._stream.truncate()


class Corpus:
    """The documents of some files, in order, and the account of what was left out."""

    def __init__(self, names: Sequence[str]) -> None:
        self.files = find_files(names)
        self.skipped = Skipped()
        self.selection: Selection | None = None
        """Which documents are given; all where there is none."""
        parts = parts_of_names(self.files)
        self.pieces = [Piece(path, parts=parts) for path in self.files]
        self._manifests = {folder: _artifact(folder) for folder in dict.fromkeys(path.parent for path in self.files)}
        self._begin()

    def _begin(self) -> None:
        self.bytes_read, self.documents = 0, 0
        self.skipped.clear()
        self.selected = 0
        """Of the documents, those that the selection takes."""
        self.places: list[np.ndarray] = []
        """Places of documents in the list of a selection."""

    @property
    def hash(self) -> str:
        """One hash for the contents of all files, whatever they are called."""
        return hash_json([entry["sha256"] for entry in self.file_hashes])

    @functools.cached_property
    def file_hashes(self) -> list[dict[str, Any]]:
        """Name, bytes and SHA-256 of each file."""
        return [{"name": path.name} | (self._recorded(path) or hash_file(path)) for path in self.files]

    def _recorded(self, path: Path) -> dict[str, Any] | None:
        """What the manifest says of a block of documents."""
        manifest = self._manifests[path.parent]
        return manifest.files.get(path.name) if manifest else None

    def plan(self, block_bytes: int) -> list[list[Piece]]:
        """The pieces of blocks of about so many bytes.

        Plain files larger than that are read through, to count their lines.
        """
        count = LineCount()
        return [[piece._replace(lines_before=count.before(piece.path, piece.start)) if piece.start else piece
                 for piece in filter(None, map(settle, pieces))] for pieces in make_plan(self.files, block_bytes)]

    def part(self, pieces: Sequence[Piece], stream: IO[str]) -> Self:
        """The documents of some pieces, with an account of their own; ``stream`` is for what is set aside."""
        part = copy.copy(self)
        part.pieces, part.skipped = list(pieces), Skipped(stream)
        part._begin()
        return part

    def __iter__(self) -> Iterator[Document]:
        self._begin()
        if self.selection is None:
            yield from self._read()
            return
        for some in in_batches(self._read()):
            chosen, places = self.selection.choose([document.id for document in some])
            self.selected += int(chosen.sum())
            self.places.append(places)
            yield from itertools.compress(some, chosen)

    def _read(self) -> Iterator[Document]:
        before = 0
        for piece in self.pieces:
            path = piece.path
            if self._recorded(path) and (manifest := self._manifests[path.parent]):
                check_files(path.parent, manifest, checksums=True, names=[path.name])
            for line, found, position in read_records(piece):
                self.bytes_read = before + position - piece.start
                if isinstance(found, BadRecordError):
                    self.skipped.add(path, line, str(found))
                    continue
                self.documents += 1
                yield found
            before += piece.size
            self.bytes_read = before

    def check(self) -> None:
        """Check, before anything is written, that there is a usable document.

        Raises:
            DataError: there is none.
        """
        for _ in self:
            return
        self.finish()

    def batches(self, label: str) -> Iterator[tuple[Document, ...]]:
        """The documents, some at a time, with progress on stderr.

        Raises:
            DataError: there was no usable document.
        """
        from megatron_m3.platform.progress import Progress

        with Progress(label, sum(piece.size for piece in self.pieces), "bytes") as progress:
            for batch in in_batches(self):
                yield batch
                progress.advance(self.bytes_read - progress.count)
        self.finish()

    def example(self) -> str:
        """The id of the first document."""
        return next(self._read()).id

    def finish(self) -> None:
        """Check that there was at least one document.

        Raises:
            DataError: there was none.
        """
        if not self.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons().items())
            names = ", ".join(str(path) for path in self.files[:NAMED])
            names += f" and {len(self.files) - NAMED:,} more" * (len(self.files) > NAMED)
            raise DataError(f"{names}: no usable document" + (f" ({reasons})" if reasons else "; the corpus is empty"))

    def write_account(self, folder: Path, counts: dict[str, Any]) -> None:
        """Write ``counts.json`` into ``folder``, and ``skipped.jsonl`` if anything was set aside."""
        with atomic_path(folder / "counts.json") as path:
            path.write_text(json.dumps(counts, indent=1) + "\n")
        if self.skipped:
            with atomic_path(folder / SKIPPED) as path, path.open("w") as stream:
                stream.writelines(self.skipped.lines())

    def counts(self, **more: int) -> dict[str, Any]:
        """What was read, what was left out and why, and ``more``."""
        return {"documents": self.documents, "skipped": len(self.skipped), "reasons": self._reasons(), **more}

    def _reasons(self) -> dict[str, int]:
        return dict(sorted(self.skipped.reasons.items()))


def show_counts(title: str, counts: dict[str, Any]) -> None:
    """Print a small table of counts to stderr."""
    print(f"{title}:", file=sys.stderr)
    for name, value in counts.items():
        if isinstance(value, dict):
            for reason, count in value.items():
                print(f"  {'- ' + reason:<28}{count:>14,}", file=sys.stderr)
        else:
            print(f"  {name:<28}{value:>14,}", file=sys.stderr)
