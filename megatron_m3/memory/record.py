"""The record of one reference in a bank: fixed size, so that its place in a shard is a multiplication.

    codes      uint8 [G, L, K * bytes]   G key-value heads, L memory layers, K kept tokens, in the codec's order
    positions  int16 [G, L, K]
    num_kept   int32
    checksums  uint32 [G]                  CRC32 of a head's codes, positions and of num_kept

All little-endian and C-contiguous. The head comes first, so that a tensor-parallel rank reads one contiguous slice of
the codes; the checksums are by head, so that it can check what it read. Slots that hold no kept token are 0.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def record_bytes(num_heads: int, num_lists: int, num_kept_tokens: int, token_bytes: int) -> int:
    """Bytes of a record in which ``num_lists`` pairs of a layer and a head, all heads together, hold kept tokens."""
    return num_lists * num_kept_tokens * (token_bytes + 2) + 4 * num_heads + 4


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Shape of the records of one bank."""

    num_heads: int
    num_layers: int
    num_kept_tokens: int
    token_bytes: int
    """Bytes of the key and the value of one kept token."""

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's codes."""
        return self.num_layers * self.num_kept_tokens * self.token_bytes

    @property
    def codes_bytes(self) -> int:
        """Bytes of all codes; what follows starts here."""
        return self.num_heads * self.head_bytes

    @property
    def positions_bytes(self) -> int:
        """Bytes of one head's positions."""
        return 2 * self.num_layers * self.num_kept_tokens

    @property
    def tail_bytes(self) -> int:
        """Bytes after the codes."""
        return self.num_heads * (self.positions_bytes + 4) + 4

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.codes_bytes + self.tail_bytes

    def pack(self, codes_NLGB: np.ndarray, positions_NLGK: Tensor, num_kept_N: Tensor) -> np.ndarray:
        """Records of some references, uint8 [N, record_bytes]; their codes are those of :meth:`Codec.encode`."""
        count = len(codes_NLGB)
        valid_NK = np.arange(self.num_kept_tokens) < num_kept_N.numpy()[:, None]
        positions_NGLK = positions_NLGK.numpy().transpose(0, 2, 1, 3) * valid_NK[:, None, None, :]
        records = np.empty((count, self.record_bytes), np.uint8)
        records[:, : self.codes_bytes] = codes_NLGB.transpose(0, 2, 1, 3).reshape(count, -1)
        codes, positions, num_kept, _ = self.parts(records[:, : self.codes_bytes], records[:, self.codes_bytes :])
        positions[:] = np.ascontiguousarray(positions_NGLK.astype("<i2")).view(np.uint8).reshape(positions.shape)
        num_kept[:] = num_kept_N.numpy().astype("<i4").view(np.uint8).reshape(count, 4)
        sums = [[self._checksum(codes[row, head], positions[row, head], num_kept[row])
                 for head in range(self.num_heads)] for row in range(count)]
        records[:, -4 * self.num_heads :] = np.array(sums, "<u4").reshape(count, self.num_heads).view(np.uint8)
        return records

    def parts(
        self, codes: np.ndarray, tail: np.ndarray, heads: slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Views of the bytes of ``heads``: codes and positions [N, heads, bytes], num_kept [N, 4], sums [N, heads, 4].

        ``codes`` holds the codes of ``heads`` alone, ``tail`` all that stands after the codes in a record.
        """
        count, middle = len(codes), self.num_heads * self.positions_bytes
        positions = tail[:, :middle].reshape(count, self.num_heads, self.positions_bytes)[:, heads]
        sums = tail[:, middle + 4 :].reshape(count, self.num_heads, 4)[:, heads]
        code = codes.reshape(count, codes.shape[1] // self.head_bytes, self.head_bytes)
        return code, positions, tail[:, middle : middle + 4], sums

    def damaged_rows(self, codes: np.ndarray, tail: np.ndarray, heads: slice = slice(None)) -> list[int]:
        """Rows in which the checksum of a head does not fit; arguments as in :meth:`parts`."""
        code, positions, num_kept, sums = self.parts(codes, tail, heads)
        recorded = np.ascontiguousarray(sums).view("<u4")[..., 0]
        return [
            row for row in range(len(code))
            if any(self._checksum(code[row, head], positions[row, head], num_kept[row]) != recorded[row, head]
                   for head in range(code.shape[1]))
        ]

    @staticmethod
    def _checksum(codes: np.ndarray, positions: np.ndarray, num_kept: np.ndarray) -> int:
        return zlib.crc32(num_kept, zlib.crc32(positions, zlib.crc32(codes)))

    def unpack(
        self, codes: np.ndarray, tail: np.ndarray, heads: slice = slice(None)
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Codes uint8 [N, L, heads, K * token_bytes], positions int16 [N, L, heads, K], num_kept int32 [N]."""
        code, positions, num_kept, _ = self.parts(codes, tail, heads)
        count, num_heads = code.shape[:2]
        shape = (count, num_heads, self.num_layers, self.num_kept_tokens * self.token_bytes)
        places = (count, num_heads, self.num_layers, self.num_kept_tokens)
        placed = np.ascontiguousarray(positions).view("<i2").reshape(places)
        return (
            code.reshape(shape).transpose(0, 2, 1, 3),
            torch.from_numpy(placed.transpose(0, 2, 1, 3).astype(np.int16)),
            torch.from_numpy(np.ascontiguousarray(num_kept).view("<i4")[:, 0].astype(np.int32)),
        )
