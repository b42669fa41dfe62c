"""The record of one reference in a bank: fixed size, so that its place in a shard is a multiplication.

    codes      uint8 [C, K * bytes]   C lists, K kept tokens; a list is what one head of one layer holds
    positions  int16 [C, K]
    num_kept   int32
    checksums  uint32 [G]             G key-value heads; CRC32 of a head's codes, positions and of num_kept

All little-endian and C-contiguous. Lists are by head, then by memory layer, so that a tensor-parallel rank reads one
contiguous slice of the codes; the checksums are by head, so that it can check what it read. Heads that hold no memory
in a layer have no list there. Slots that hold no kept token are 0.
"""

import functools
import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def record_bytes(num_heads: int, num_lists: int, num_kept_tokens: int, token_bytes: int) -> int:
    """Bytes of a record of ``num_lists`` lists, all heads together."""
    return num_lists * num_kept_tokens * (token_bytes + 2) + 4 * num_heads + 4


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Shape of the records of one bank."""

    held_LG: Tensor
    """Which heads hold memory in which memory layers, bool."""
    num_kept_tokens: int
    token_bytes: int
    """Bytes of the key and the value of one kept token."""

    @property
    def num_heads(self) -> int:
        """Key-value heads, those that hold no memory too."""
        return self.held_LG.shape[1]

    @property
    def list_bytes(self) -> int:
        """Bytes of the codes of one list."""
        return self.num_kept_tokens * self.token_bytes

    @functools.cached_property
    def codes_bytes(self) -> int:
        """Bytes of all codes; what follows starts here."""
        return int(self.held_LG.sum()) * self.list_bytes

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return record_bytes(self.num_heads, int(self.held_LG.sum()), self.num_kept_tokens, self.token_bytes)

    def lists(self, heads: slice) -> slice:
        """The lists of ``heads``, in the record's order."""
        first, last, _ = heads.indices(self.num_heads)
        return slice(int(self.held_LG[:, :first].sum()), int(self.held_LG[:, : max(first, last)].sum()))

    def codes(self, heads: slice) -> slice:
        """Where in a record the codes of ``heads`` are."""
        lists = self.lists(heads)
        return slice(lists.start * self.list_bytes, lists.stop * self.list_bytes)

    def pack(self, codes_NCB: np.ndarray, positions_NLGK: Tensor, num_kept_N: Tensor) -> np.ndarray:
        """Records of some references, uint8 [N, record_bytes]; their codes are those of :meth:`Codec.encode`."""
        count = len(codes_NCB)
        valid_NK = np.arange(self.num_kept_tokens) < num_kept_N.numpy()[:, None]
        positions_NCK = (positions_NLGK[:, self.held_LG].numpy() * valid_NK[:, None]).astype("<i2")
        order_C = by_head(self.held_LG)
        records = np.empty((count, self.record_bytes), np.uint8)
        codes, positions, num_kept, sums = self.fields(records)
        codes[:] = codes_NCB[:, order_C].reshape(codes.shape)
        positions[:] = positions_NCK[:, order_C].view(np.uint8).reshape(positions.shape)
        num_kept[:] = num_kept_N.numpy().astype("<i4").view(np.uint8).reshape(count, 4)
        sums[:] = self.checksums(records).view(np.uint8).reshape(sums.shape)
        return records

    def part(self, heads: slice) -> tuple["RecordLayout", list[slice]]:
        """The layout of what a record holds of ``heads``, which is a record itself, and the bytes that make it up."""
        first, last, _ = heads.indices(self.num_heads)
        last = max(first, last)
        lists, positions = self.lists(heads), 2 * self.num_kept_tokens
        middle = self.record_bytes - 4 * self.num_heads - 4
        pieces = [
            self.codes(heads),
            slice(self.codes_bytes + lists.start * positions, self.codes_bytes + lists.stop * positions),
            slice(middle, middle + 4),
            slice(middle + 4 + 4 * first, middle + 4 + 4 * last),
        ]
        return replace(self, held_LG=self.held_LG[:, first:last]), _joined(pieces)

    def fields(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Views of records [N, record_bytes]: codes, positions, num_kept and checksums, as bytes."""
        middle = self.record_bytes - 4 * self.num_heads - 4
        return (records[:, : self.codes_bytes], records[:, self.codes_bytes : middle], records[:, middle : middle + 4],
                records[:, middle + 4 :])

    @functools.cached_property
    def _heads(self) -> list[tuple[slice, slice]]:
        """Codes and positions of each head in a record."""
        code, place, start = self.list_bytes, 2 * self.num_kept_tokens, self.codes_bytes
        ends = itertools.pairwise(itertools.accumulate(self.held_LG.sum(0).tolist(), initial=0))
        return [(slice(code * first, code * last), slice(start + place * first, start + place * last))
                for first, last in ends]

    def checksums(self, records: np.ndarray) -> np.ndarray:
        """What the checksums of records should be, uint32 [N, heads]."""
        return np.array([self._sums(row.data) for row in records], "<u4").reshape(len(records), self.num_heads)

    def _sums(self, record: memoryview) -> list[int]:
        middle = self.record_bytes - 4 * self.num_heads - 4
        num_kept = record[middle : middle + 4]
        return [zlib.crc32(num_kept, zlib.crc32(record[positions], zlib.crc32(record[codes])))
                for codes, positions in self._heads]

    def damaged_rows(self, records: np.ndarray, rows: Sequence[int] | None = None) -> list[int]:
        """Of ``rows``, or all, those in which the checksum of a head does not fit."""
        place, form = self.record_bytes - 4 * self.num_heads, f"<{self.num_heads}I"
        return [row for row in (range(len(records)) if rows is None else rows)
                if struct.pack(form, *self._sums(records[row].data)) != records[row, place:].data]

    def unpack(self, records: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
        """Codes of the lists as :meth:`Codec.decode` takes them, positions int16 [N, L, G, K] (0 where a head holds
        no memory), num_kept int32 [N]."""
        count, order_C = len(records), np.argsort(by_head(self.held_LG))
        codes, positions, num_kept, _ = self.fields(records)
        placed_NCK = np.ascontiguousarray(positions).view("<i2").reshape(count, len(order_C), self.num_kept_tokens)
        positions_NLGK = torch.zeros((count, *self.held_LG.shape, self.num_kept_tokens), dtype=torch.int16)
        positions_NLGK[:, self.held_LG] = torch.from_numpy(placed_NCK[:, order_C].astype(np.int16))
        return (
            codes.reshape(count, len(order_C), self.list_bytes)[:, order_C],
            positions_NLGK,
            torch.from_numpy(np.ascontiguousarray(num_kept).view("<i4")[:, 0].astype(np.int32)),
        )


def _joined(pieces: Sequence[slice]) -> list[slice]:
    """Ascending pieces without the empty ones, those that touch as one."""
    joined: list[slice] = []
    for piece in pieces:
        if joined and joined[-1].stop == piece.start:
            joined[-1] = slice(joined[-1].start, piece.stop)
        elif piece.stop > piece.start:
            joined.append(piece)
    return joined


def by_head(held_LG: Tensor) -> np.ndarray:
    """The lists, which codecs have by layer and head, in the record's order: by head and layer."""
    number_LG = held_LG.flatten().cumsum(0).view(held_LG.shape) - 1
    return number_LG.T[held_LG.T].numpy()
