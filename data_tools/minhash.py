"""MinHash signatures, and the bands that find pairs of alike ones (Broder 1997; Leskovec et al., ch. 3)."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from data_tools.words import Words, mix
from megatron_m3.errors import ConfigError

RECALL = 0.95
"""Least chance that a pair just at the threshold shares a band."""
SEED = 1
HASHES_AT_A_TIME = 512
"""Columns of the table of permuted hashes: it stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """How alike documents are told."""

    threshold: float = 0.8
    """Jaccard similarity of their shingles from which two documents count as nearly the same."""
    num_perm: int = 128
    """Values in a signature; the similarity is estimated to about 1 / (2 * sqrt(num_perm))."""
    shingle: int = 5
    """Words in a shingle."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"minhash.threshold={self.threshold}: must be over 0 and at most 1")
        for name, most in (("num_perm", 4096), ("shingle", 100)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"minhash.{name}={getattr(self, name)}: must be from 1 to {most}")

    @property
    def rows(self) -> int:
        """Values in a band: as many as keep the chance of a pair at the threshold above ``RECALL``."""
        enough = [rows for rows in range(1, self.num_perm + 1)
                  if 1 - (1 - self.threshold**rows) ** (self.num_perm // rows) >= RECALL]
        return max(enough, default=1)

    @property
    def bands(self) -> int:
        """Bands of a signature."""
        return self.num_perm // self.rows

    def sign(self, words: Words) -> np.ndarray:
        """uint32 [texts, num_perm]: the signatures of the texts' shingles; all ones where there is no word."""
        hashes, firsts = words.hashes(self.shingle)
        hashes = (hashes >> np.uint64(32)).astype(np.uint32)
        factors, offsets = _permutations(self.num_perm)
        signatures = np.full((len(firsts) - 1, self.num_perm), 0xFFFFFFFF, np.uint32)
        for signature, (first, last) in zip(signatures, itertools.pairwise(firsts.tolist()), strict=True):
            for begin in range(first, last, HASHES_AT_A_TIME):
                table = hashes[begin : min(begin + HASHES_AT_A_TIME, last)] * factors
                table += offsets
                np.minimum(signature, table.min(axis=1), out=signature)
        return signatures

    def band_keys(self, signatures: np.ndarray) -> np.ndarray:
        """uint64 [documents, bands]: equal where two documents agree in a whole band (or by a chance of 2^-64)."""
        values = signatures[:, : self.bands * self.rows].reshape(len(signatures), self.bands, self.rows)
        keys = np.broadcast_to(np.arange(1, self.bands + 1, dtype=np.uint64), values.shape[:2])
        for row in range(self.rows):
            keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + values[:, :, row])
        return keys


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and offsets, uint32 [count, 1]: each pair permutes the numbers mod 2^32."""
    numbers = np.random.default_rng(SEED).integers(0, 1 << 32, (2, count, 1), np.uint32)
    return numbers[0] | np.uint32(1), numbers[1]
