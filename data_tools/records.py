"""The records of a file: documents of JSON lines, text, parquet and WARC files, or why there is none.

- ``.jsonl``, ``.json``, ``.jsonl.gz``, ``.jsonl.zst``: one object a line, its text in ``text``, optionally an ``id``.
- ``.txt``: documents are separated by blank lines; also ``.txt.gz``, ``.txt.zst``.
- ``.parquet``: a column ``text``, optionally ``id``.
- ``.warc``, ``.warc.gz``: HTML pages, their main text; ``.warc.wet``, ``.warc.wet.gz``: texts. The id is the URL.

A document without an id is called FILE:LINE (in parquet files lines are rows).
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from megatron_m3.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet", ".warc",
            ".warc.gz", ".warc.wet", ".warc.wet.gz")
ROUNDED = (float, list, dict)
"""What orjson may have made of a whole number that is too large for it."""
BATCH = 512
"""Documents that are worked on at a time."""
BATCH_CHARACTERS = 1 << 22
"""Fewer documents are, when they have so many characters together: tokens take some 40 bytes for each."""
PARQUET_ROWS = 128
"""Rows of a parquet file that are decoded at a time."""
TOLD = 64
"""Lines from one look at the position in a file to the next: each is a call of the system."""


class Document(NamedTuple):
    """One text of the corpus."""

    id: str
    text: str


class BadRecordError(Exception):
    """Why a record cannot be used."""


class Piece(NamedTuple):
    """Some of a file; bytes at which records begin, in a plain file."""

    path: Path
    start: int = 0
    stop: int | None = None
    """None for the whole file."""
    lines_before: int | None = None
    """Lines of the file before ``start``, where they were counted."""
    parts: int = 1
    """Last parts of the path that are the file's name."""

    @property
    def name(self) -> str:
        """FILE, in Unicode; FILE@START where lines are counted from there."""
        name = "/".join(self.path.parts[-self.parts :]).encode(errors="backslashreplace").decode()
        return f"{name}@{self.start}" if self.start and self.lines_before is None else name

    @property
    def size(self) -> int:
        """Bytes in it."""
        return (self.path.stat().st_size if self.stop is None else self.stop) - self.start


def in_batches[Row: tuple[str, ...]](rows: Iterable[Row]) -> Iterator[tuple[Row, ...]]:
    """Documents, or rows that begin like them, as many at a time as are worked on."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row[1])
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield tuple(batch)
            batch, characters = [], 0
    if batch:
        yield tuple(batch)


def read_records(piece: Piece) -> Iterator[tuple[int, Document | BadRecordError, int]]:
    """Line, document (or why there is none), and about the position in the file in bytes, of every record of a piece.

    Raises:
        DataError: the file is damaged.
    """
    path = piece.path
    if path.name.endswith(".parquet"):
        records = _read_parquet(path)
    elif ".warc" in path.name:
        from data_tools.warc import read_warc

        records = read_warc(path)
    else:
        records = _read_lines(path, piece.start, piece.stop)
    name, before = piece.name, piece.lines_before or 0
    for number, record, position in records:
        line = before + number
        try:
            yield line, _document(record, name, line), position
        except BadRecordError as error:
            yield line, error, position


def _document(record: Any, file: str, line: int) -> Document:
    if isinstance(record, BadRecordError):
        raise record
    if not isinstance(record, dict) or not isinstance(text := record.get("text"), str):
        raise BadRecordError("no text")
    if not text or text.isspace():
        raise BadRecordError("empty text")
    given = record.get("id")
    document = Document(f"{file}:{line}" if given in (None, "") else str(given), text)
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
            # a small buffer, as of a file that ends early its last content is lost
            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        lines = stream if stop is None else _lines_before(raw, stop)
        records = _text_records(lines) if ".txt" in path.suffixes[-2:] else _json_records(lines)
        position, look = start, 0
        try:
            for line, record in records:
                if line >= look:
                    position, look = raw.tell(), line + TOLD
                yield line, record, position
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); get it again") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise DataError(f"{path}: damaged zstd file ({error}); get it again") from None


def _lines_before(raw: BinaryIO, stop: int) -> Iterator[bytes]:
    left = stop - raw.tell()
    while left > 0 and (line := raw.readline()):
        left -= len(line)
        yield line


def _decode(line: bytes) -> str:
    try:
        return line.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        raise BadRecordError("not UTF-8") from None


def _json_records(stream: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            yield number, _json(line)
        except BadRecordError as error:
            yield number, error
        except (ValueError, RecursionError):
            yield number, BadRecordError("not JSON")


def _json(line: bytes) -> Any:
    """The value of a line as Python's decoder has it, by one that is several times as fast where it has the same.

    orjson refuses some of what Python takes (NaN, a byte order mark, surrogates, whose text is told to be bad), and has
    large whole numbers rounded, which matters in an id.
    """
    try:
        record = orjson.loads(line)
    except ValueError:
        return json.loads(_decode(line))
    rounded = isinstance(record, dict) and isinstance(record.get("id"), ROUNDED)
    return json.loads(_decode(line)) if rounded else record


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
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        types = {name: str(kind) for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)}
        if types.get("text") not in ("string", "large_string", "binary", "large_binary"):
            raise DataError(f"{path}: no column 'text' that holds text; its columns are {types}")
        columns = [name for name in ("id", "text") if name in types]
        row = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
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
