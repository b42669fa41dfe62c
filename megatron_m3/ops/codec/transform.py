"""Transform coding: each class of vectors has its own mean, its own Karhunen-Loève transform, and its own bits.

Vectors of a class are centred, turned to uncorrelated coordinates of unit variance, and each coordinate is rounded to
one of 2**b levels, with more bits where rounding would cost more. Levels are shared by all coordinates of equal bits.
Errors are measured by a weight matrix of the class: x costs x W x.

Letters: C classes, N vectors of a class, D numbers of a vector, A bits of a code, B bytes of a code.
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

MAX_BITS = 8
NORMAL_ERRORS = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000642, 0.000163, 0.0000411)
"""Mean squared error of the best 2**b levels for a normal variable of variance 1, by b."""
LEVEL_SAMPLE = 1 << 17
"""Coordinates that levels are fitted to."""
LEVEL_STEPS = 30
FLOOR = 1e-6
"""Smallest eigenvalue, as a share of the largest, that counts as one."""


@dataclass(frozen=True)
class TransformCode:
    """A trained code; every class has codes of the same length."""

    mean_CD: Tensor
    to_CDD: Tensor
    """Centred vectors times this are coordinates."""
    from_CDD: Tensor
    """Its inverse."""
    bits_CD: Tensor
    """uint8: bits of each coordinate; their sum is the same in all classes."""
    levels: Tensor
    """float32 [9, 256]: the ascending levels of coordinates of b bits in row b."""

    @property
    def code_bytes(self) -> int:
        """Bytes of one vector."""
        return int(self.bits_CD[0].sum()) // 8

    @classmethod
    def train(cls, vectors_CND: Tensor, weights_CDD: Tensor, code_bytes: int) -> Self:
        """The code of ``code_bytes`` bytes for vectors like these, the least wrong by ``weights_CDD``."""
        mean_CD = vectors_CND.mean(1)
        centred = vectors_CND - mean_CD[:, None]
        root, inverse_root = _roots(weights_CDD)
        weighted = centred @ root
        variance_CD, axes = torch.linalg.eigh(weighted.transpose(1, 2) @ weighted / vectors_CND.shape[1])
        variance_CD = variance_CD.clamp_min(FLOOR * variance_CD.max(-1, keepdim=True).values).clamp_min(1e-30)
        spread = variance_CD.sqrt()[:, None]
        to_CDD, from_CDD = root @ axes / spread, (axes * spread).transpose(1, 2) @ inverse_root
        bits_CD = _share_bits(variance_CD, 8 * code_bytes)
        levels = _fit_levels((centred @ to_CDD).transpose(1, 2), bits_CD)
        return cls(mean_CD, to_CDD.contiguous(), from_CDD.contiguous(), bits_CD, levels)

    def encode(self, vectors_CND: Tensor) -> np.ndarray:
        """Codes uint8 [C, N, B]."""
        coordinates = (vectors_CND - self.mean_CD[:, None]) @ self.to_CDD
        level_CND = torch.zeros(coordinates.shape, dtype=torch.uint8)
        for bits in range(1, MAX_BITS + 1):
            chosen_CD, levels = self.bits_CD == bits, self.levels[bits, : 1 << bits]
            edges = (levels[1:] + levels[:-1]) / 2
            level_CND.transpose(1, 2)[chosen_CD] = torch.bucketize(coordinates.transpose(1, 2)[chosen_CD], edges).byte()
        every_CNA = np.unpackbits(level_CND.numpy(), axis=-1)
        classes = zip(every_CNA, self._places(), strict=True)
        return np.stack([np.packbits(every_NA[:, kept_A], axis=-1) for every_NA, kept_A in classes])

    def decode(self, codes_CNB: np.ndarray, classes: Tensor) -> Tensor:
        """Vectors, float32 [C, N, D], that the codes of ``classes`` stand for."""
        bits_CD = self.bits_CD[classes]
        every_CNA = np.zeros((*codes_CNB.shape[:2], MAX_BITS * bits_CD.shape[1]), np.uint8)
        for every_NA, code_NB, kept_A in zip(every_CNA, codes_CNB, self._places()[classes.numpy()], strict=True):
            every_NA[:, kept_A] = np.unpackbits(code_NB, axis=-1)
        level_CND = torch.from_numpy(np.packbits(every_CNA, axis=-1)).int()
        coordinates = self.levels.flatten()[level_CND + 256 * bits_CD[:, None].int()]
        return coordinates @ self.from_CDD[classes] + self.mean_CD[classes][:, None]

    def _places(self) -> np.ndarray:
        """Where the bits of a code stand among 8 bits for every coordinate, int64 [C, A]."""
        kept = torch.arange(MAX_BITS) >= MAX_BITS - self.bits_CD[..., None].int()
        return kept.flatten(1).nonzero()[:, 1].reshape(len(kept), -1).numpy()

    def tensors(self) -> dict[str, Tensor]:
        """All that it consists of, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _roots(weights_CDD: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of weight matrices, and their inverses."""
    values, axes = torch.linalg.eigh(weights_CDD)
    values = values.clamp_min(1e-4 * values.mean(-1, keepdim=True)).clamp_min(1e-30).sqrt()[:, None]
    return (axes * values) @ axes.transpose(1, 2), (axes / values) @ axes.transpose(1, 2)


def _share_bits(variance_CD: Tensor, total: int) -> Tensor:
    """Bits of each coordinate, uint8: one after another to where it lowers the squared error most."""
    errors = torch.tensor(NORMAL_ERRORS, dtype=variance_CD.dtype)
    # gains fall with every bit of a coordinate, so the greedy choice is the largest ones
    gain = (variance_CD[..., None] * (errors[:-1] - errors[1:])).flatten(1)
    taken = gain.argsort(dim=-1, descending=True, stable=True)[:, :total] // MAX_BITS
    bits = torch.zeros(variance_CD.shape, dtype=torch.int64)
    return bits.scatter_add_(1, taken, torch.ones_like(taken)).to(torch.uint8)


def _fit_levels(coordinates_CDN: Tensor, bits_CD: Tensor) -> Tensor:
    """Lloyd's levels for the coordinates of each number of bits, row by row; unused rows are 0."""
    levels = torch.zeros(MAX_BITS + 1, 1 << MAX_BITS)
    for bits in range(1, MAX_BITS + 1):
        values = coordinates_CDN[bits_CD == bits].flatten()
        if len(values):
            step = -(-len(values) // LEVEL_SAMPLE)
            levels[bits, : 1 << bits] = _lloyd(values[::step], 1 << bits)
    return levels


def _lloyd(values: Tensor, count: int) -> Tensor:
    """Ascending levels that round ``values``, of variance 1, with little squared error.

    They start where the best ones for many normal values are, as dense as the cube root of the values' density.
    """
    values = values.sort().values
    levels = 3**0.5 * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).to(values.dtype)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    for _ in range(LEVEL_STEPS):
        edges = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), edges, torch.tensor([len(values)])])
        number = ends.diff()
        means = (sums[ends].diff() / number.clamp_min(1)).to(values.dtype)
        levels = torch.where(number > 0, means, levels)
    return levels.sort().values
