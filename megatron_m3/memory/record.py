"""The record of one reference in a bank: fixed size, so that its place in a shard is a multiplication.

    codes      uint8 [C, K * bytes]   C lists, K kept tokens; a list is what one head of one layer holds
    positions  int16 [C, K]
    num_kept   int32
    checksums  uint32 [G]             G key-value heads; CRC32 of a head's codes, positions and of num_kept

All little-endian and C-contiguous. Lists are by head, then by memory layer, so that a tensor-parallel rank reads one
contiguous slice of the codes; the checksums are by head, so that it can check what it read. Heads that hold no memory
in a layer have no list there. Slots that hold no kept token are 0.
"""

import itertools
import zlib
from dataclasses import dataclass

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

    @property
    def codes_bytes(self) -> int:
        """Bytes of all codes; what follows starts here."""
        return int(self.held_LG.sum()) * self.list_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes after the codes."""
        return self.record_bytes - self.codes_bytes

    @property
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
        order_C = _by_head(self.held_LG)
        records = np.empty((count, self.record_bytes), np.uint8)
        codes, tail = records[:, : self.codes_bytes], records[:, self.codes_bytes :]
        positions, num_kept, sums = self.parts(tail)
        codes[:] = codes_NCB[:, order_C].reshape(codes.shape)
        positions[:] = positions_NCK[:, order_C].view(np.uint8).reshape(positions.shape)
        num_kept[:] = num_kept_N.numpy().astype("<i4").view(np.uint8).reshape(count, 4)
        sums[:] = self.checksums(codes, tail).view(np.uint8).reshape(sums.shape)
        return records

    def parts(self, tail: np.ndarray, heads: slice = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of the bytes of ``heads``: positions [N, bytes], num_kept [N, 4], checksums [N, heads * 4].

        ``tail`` is all that stands after the codes in a record.
        """
        first, last, _ = heads.indices(self.num_heads)
        lists, size = self.lists(heads), 2 * self.num_kept_tokens
        middle = self.lists(slice(None)).stop * size
        sums = tail[:, middle + 4 + 4 * first : middle + 4 + 4 * max(first, last)]
        return tail[:, lists.start * size : lists.stop * size], tail[:, middle : middle + 4], sums

    def checksums(self, codes: np.ndarray, tail: np.ndarray, heads: slice = slice(None)) -> np.ndarray:
        """What the checksums of ``heads`` should be, uint32 [N, heads]; ``codes`` are those of ``heads`` alone."""
        positions, num_kept, _ = self.parts(tail, heads)
        sizes = self.held_LG[:, heads].sum(0).tolist()
        ends = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        code, place = self.list_bytes, 2 * self.num_kept_tokens
        found = [
            [zlib.crc32(num_kept[row], zlib.crc32(positions[row, place * first : place * last],
                                                  zlib.crc32(codes[row, code * first : code * last])))
             for first, last in ends]
            for row in range(len(tail))
        ]
        return np.array(found, "<u4").reshape(len(tail), len(ends))

    def damaged_rows(self, codes: np.ndarray, tail: np.ndarray, heads: slice = slice(None)) -> list[int]:
        """Rows in which the checksum of a head does not fit; arguments as in :meth:`checksums`."""
        recorded = np.ascontiguousarray(self.parts(tail, heads)[2]).view("<u4")
        return np.flatnonzero((recorded != self.checksums(codes, tail, heads)).any(1)).tolist()

    def unpack(
        self, codes: np.ndarray, tail: np.ndarray, heads: slice = slice(None)
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Codes of the lists of ``heads`` as :meth:`Codec.decode` takes them, positions int16 [N, L, heads, K] (0 where
        a head holds no memory), num_kept int32 [N]; arguments as in :meth:`checksums`."""
        held_LG, count = self.held_LG[:, heads], len(tail)
        order_C = np.argsort(_by_head(held_LG))
        positions, num_kept, _ = self.parts(tail, heads)
        placed_NCK = np.ascontiguousarray(positions).view("<i2").reshape(count, len(order_C), self.num_kept_tokens)
        positions_NLGK = torch.zeros((count, *held_LG.shape, self.num_kept_tokens), dtype=torch.int16)
        positions_NLGK[:, held_LG] = torch.from_numpy(placed_NCK[:, order_C].astype(np.int16))
        return (
            codes.reshape(count, len(order_C), self.list_bytes)[:, order_C],
            positions_NLGK,
            torch.from_numpy(np.ascontiguousarray(num_kept).view("<i4")[:, 0].astype(np.int32)),
        )


def _by_head(held_LG: Tensor) -> np.ndarray:
    """The lists, which codecs have by layer and head, in the record's order: by head and layer."""
    number_LG = held_LG.flatten().cumsum(0).view(held_LG.shape) - 1
    return number_LG.T[held_LG.T].numpy()
