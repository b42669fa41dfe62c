"""Files in blocks of about the same bytes: small files together, plain ones in pieces that begin at records."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.records import Piece

PLAIN = (".jsonl", ".json", ".txt")
"""Types of file that can be cut into pieces."""


def parts_of_names(files: Sequence[Path]) -> int:
    """Fewest last parts of the paths that tell the files apart: 1 unless two in different folders are called the same.
    """
    distinct, parts = len({path.parts for path in files}), 1
    while len({path.parts[-parts:] for path in files}) < distinct:
        parts += 1
    return parts


def make_plan(files: Sequence[Path], block_bytes: int) -> Iterator[list[Piece]]:
    """The pieces of each block; depends on names and sizes of the files alone."""
    block: list[Piece] = []
    filled, parts = 0, parts_of_names(files)
    for path in files:
        size = path.stat().st_size
        cuts = [*range(0, size, block_bytes)] if path.name.endswith(PLAIN) and size > block_bytes else [0]
        for start in cuts:
            stop = min(start + block_bytes, size) if len(cuts) > 1 else None
            length = (stop or size) - start
            if block and filled + length > block_bytes:
                yield block
                block, filled = [], 0
            block.append(Piece(path, start, stop, parts=parts))
            filled += length
    if block:
        yield block


def find_record(path: Path, offset: int) -> int:
    """Where the first record at or after byte ``offset`` of a plain file begins."""
    if offset == 0:
        return 0
    with path.open("rb") as stream:
        stream.seek(offset - 1)
        stream.readline()
        while path.suffix == ".txt" and stream.readline().strip():  # to the blank line that ends the document
            pass
        return stream.tell()


def settle(piece: Piece) -> Piece | None:
    """The piece, its ends moved on to where records begin; None where nothing is left."""
    if piece.stop is None:
        return piece
    start, stop = find_record(piece.path, piece.start), find_record(piece.path, piece.stop)
    return piece._replace(start=start, stop=stop) if start < stop else None


class LineCount:
    """Counts the lines before places of files that are asked for in order; each file is read once."""

    def __init__(self) -> None:
        self.path, self.place, self.lines = Path(), 0, 0

    def before(self, path: Path, place: int) -> int:
        """Lines of a file before its byte ``place``."""
        if path != self.path or place < self.place:
            self.path, self.place, self.lines = path, 0, 0
        for data in read_bytes(path, self.place, place):
            self.lines += data.count(b"\n")
        self.place = place
        return self.lines


def read_bytes(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes ``start`` to ``stop`` of a file, a MiB at a time."""
    left = stop - start
    if left <= 0:
        return
    with path.open("rb") as stream:
        stream.seek(start)
        while left > 0 and (data := stream.read(min(left, 1 << 20))):
            left -= len(data)
            yield data
