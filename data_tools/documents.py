"""Documents from JSONL, text and parquet files. What cannot be used is counted and set aside, with its file and line.

- ``.jsonl``, ``.json``, ``.jsonl.gz``, ``.jsonl.zst``: one object a line, its text in ``text``, optionally an ``id``.
- ``.txt``: documents are separated by blank lines; also ``.txt.gz``, ``.txt.zst``.
- ``.parquet``: a column ``text``, optionally ``id``.
- ``.warc``, ``.warc.gz``: HTML pages, their main text; ``.warc.wet``, ``.warc.wet.gz``: texts. The id is the URL.
- a folder made by `m3 data collect`, `filter` or `deduplicate`: its blocks.

A document without an id is called FILE:LINE (in parquet files lines are rows).
"""

import functools
import gzip
import io
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_m3.errors import DataError
from megatron_m3.manifest import Manifest, atomic_path, check_files, hash_file, hash_json, read_manifest

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet", ".warc",
            ".warc.gz", ".warc.wet", ".warc.wet.gz")
SKIPPED = "skipped.jsonl"


class Document(NamedTuple):
    """One text of the corpus."""

    id: str
    text: str


class BadRecordError(Exception):
    """Why a record cannot be used."""


def find_files(names: Sequence[str]) -> list[Path]:
    """The corpus files that ``names`` give: files, or folders that stand for their files in order of name.

    Raises:
        DataError: one does not exist, is of an unknown type, or there is none.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir() and (manifest := _artifact(path)):
            files += [path / file for file in manifest.files]
        elif path.is_dir():
            files += sorted(one for one in path.iterdir() if one.name.endswith(SUFFIXES) and one.name != SKIPPED)
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
    """The manifest of a documents artifact; None where the folder is none.

    Raises:
        ArtifactError: it is an unfinished or damaged one.
    """
    for name, kind in (("manifest.json", '"kind": "documents"'), ("job.json", '"kind": "documents')):
        if (folder / name).is_file() and kind in (folder / name).read_text():
            return read_manifest(folder, "documents", 1)
    return None


class Corpus:
    """The documents of some files, in order, and the account of what was left out."""

    def __init__(self, names: Sequence[str]) -> None:
        self.files = find_files(names)
        self.bytes_total = sum(path.stat().st_size for path in self.files)
        self.bytes_read = 0
        self.documents = 0
        self.skipped: list[dict[str, Any]] = []
        self._manifest = functools.cache(_artifact)

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
        manifest = self._manifest(path.parent)
        return manifest.files.get(path.name) if manifest else None

    def __iter__(self) -> Iterator[Document]:
        self.bytes_read, self.documents, self.skipped = 0, 0, []
        before = 0
        for path in self.files:
            if self._recorded(path) and (manifest := self._manifest(path.parent)):
                check_files(path.parent, manifest, checksums=True, names=[path.name])
            for line, found, position in read_file(path):
                self.bytes_read = before + position
                if isinstance(found, BadRecordError):
                    self.skipped.append({"file": str(path), "line": line, "reason": str(found)})
                    continue
                self.documents += 1
                yield found
            before += path.stat().st_size
            self.bytes_read = before

    def check(self) -> None:
        """Check, before anything is written, that there is a usable document.

        Raises:
            DataError: there is none.
        """
        for _ in self:
            return
        self.finish()

    def batches(self, size: int, label: str) -> Iterator[list[Document]]:
        """The documents in lists of ``size`` (the last may be shorter), with progress on stderr.

        Raises:
            DataError: there was no usable document.
        """
        from megatron_m3.platform.progress import Progress

        documents = iter(self)
        with Progress(label, self.bytes_total, "bytes") as progress:
            while batch := list(itertools.islice(documents, size)):
                yield batch
                progress.advance(self.bytes_read - progress.count)
        self.finish()

    def finish(self) -> None:
        """Check that there was at least one document.

        Raises:
            DataError: there was none.
        """
        if not self.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons().items())
            names = ", ".join(str(path) for path in self.files)
            raise DataError(f"{names}: no usable document" + (f" ({reasons})" if reasons else "; the corpus is empty"))

    def write_account(self, folder: Path, counts: dict[str, Any]) -> None:
        """Write ``counts.json`` into ``folder``, and ``skipped.jsonl`` if anything was set aside."""
        with atomic_path(folder / "counts.json") as path:
            path.write_text(json.dumps(counts, indent=1) + "\n")
        if self.skipped:
            with atomic_path(folder / SKIPPED) as path:
                path.write_text("".join(json.dumps(entry) + "\n" for entry in self.skipped))

    def counts(self, **more: int) -> dict[str, Any]:
        """What was read, what was left out and why, and ``more``."""
        return {"documents": self.documents, "skipped": len(self.skipped), "reasons": self._reasons(), **more}

    def _reasons(self) -> dict[str, int]:
        return dict(sorted(Counter(entry["reason"] for entry in self.skipped).items()))


def show_counts(title: str, counts: dict[str, Any]) -> None:
    """Print a small table of counts to stderr."""
    print(f"{title}:", file=sys.stderr)
    for name, value in counts.items():
        if isinstance(value, dict):
            for reason, count in value.items():
                print(f"  {'- ' + reason:<28}{count:>14,}", file=sys.stderr)
        else:
            print(f"  {name:<28}{value:>14,}", file=sys.stderr)


def read_file(
    path: Path, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Document | BadRecordError, int]]:
    """Line, document (or why there is none), and position in the file in bytes, of every record of a file.

    ``start`` and ``stop`` are bytes at which records of a plain file begin; lines are counted from ``start``.

    Raises:
        DataError: the file is damaged.
    """
    if path.name.endswith(".parquet"):
        records = _read_parquet(path)
    elif ".warc" in path.name:
        from data_tools.warc import read_warc

        records = read_warc(path)
    else:
        records = _read_lines(path, start, stop)
    name = f"{path.name}@{start}" if start else path.name
    for line, record, position in records:
        try:
            yield line, _document(record, name, line), position
        except BadRecordError as error:
            yield line, error, position


def _document(record: Any, file: str, line: int) -> Document:
    if isinstance(record, BadRecordError):
        raise record
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise BadRecordError("no text")
    text: str = record["text"]
    if not text or text.isspace():
        raise BadRecordError("empty text")
    given = record.get("id")
    document = Document(f"{file}:{line}" if given is None else str(given), text)
    if not (text.isascii() and document.id.isascii()):
        try:
            "".join(document).encode()
        except UnicodeEncodeError:
            raise BadRecordError("not valid Unicode") from None
    return document


type Records = Iterator[tuple[int, Any, int]]
"""Line, record (or why it is bad), position in the file in bytes."""


def _read_lines(path: Path, start: int, stop: int | None) -> Records:
    import pyarrow

    with path.open("rb") as raw:
        raw.seek(start)
        stream: Any = raw
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
        lines = stream if stop is None else _lines_before(raw, stop)
        records = _text_records(lines) if ".txt" in path.suffixes[-2:] else _json_records(lines)
        try:
            for line, record in records:
                yield line, record, raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); get it again") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise DataError(f"{path}: damaged zstd file ({error}); get it again") from None


def _lines_before(raw: BinaryIO, stop: int) -> Iterator[bytes]:
    while raw.tell() < stop:
        yield raw.readline()


def _decode(line: bytes) -> str:
    try:
        return line.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        raise BadRecordError("not UTF-8") from None


def _json_records(stream: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    decode = json.JSONDecoder().decode
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield number, decode(_decode(line))
        except BadRecordError as error:
            yield number, error
        except (ValueError, RecursionError):
            yield number, BadRecordError("not JSON")


def _text_records(stream: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    lines: list[bytes] = []
    start = 1
    for number, line in enumerate(itertools.chain(stream, [b""]), 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            try:
                yield start, {"text": _decode(b"".join(lines)).rstrip("\r\n")}
            except BadRecordError as error:
                yield start, error
            lines = []


def _read_parquet(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        types = {name: str(kind) for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)}
        if types.get("text") not in ("string", "large_string", "binary", "large_binary"):
            raise DataError(f"{path}: no column 'text' that holds text; its columns are {types}")
        columns = [name for name in ("id", "text") if name in types]
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            ids = batch.column("id").to_pylist() if "id" in types else [None] * len(batch)
            for given, text in zip(ids, batch.column("text").cast(pyarrow.large_binary()).to_pylist(), strict=True):
                row += 1
                yield row, _row(given, text), path.stat().st_size * row // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _row(given: Any, text: bytes | None) -> Any:
    try:
        return {"id": given, "text": None if text is None else _decode(text)}
    except BadRecordError as error:
        return error
