"""Transform coding: each class of vectors has its own mean and Karhunen-Loève transform; groups of classes share bits.

Vectors of a class are centred and turned to uncorrelated coordinates. One vector of each class of a group are coded
together: all their coordinates share the bits of one code, more where an error costs more, and are rounded together by
a trellis. Errors are measured by a weight matrix of the class: x costs x W x, and costs of all classes have one unit.

Letters: C classes (those of one group, where a group is named), N vectors of a class, D numbers of a vector, B bytes of
a code, T coordinates of a group that have bits, S states of the trellis.
"""

import functools
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from megatron_m3.ops.codec import trellis
from megatron_m3.ops.codec.trellis import MAX_BITS, NORMAL_ERRORS, STATES

TABLE_SAMPLE = 1 << 18
"""Coordinates of all groups that tables are fitted to."""
TABLE_STEPS = 6
TABLE_INERTIA = 8
"""Coordinates that a table's old entry counts for when it is fitted."""
FLOOR = 1e-6
"""Smallest eigenvalue, as a share of the largest of a class, that counts as one."""
DECODED_TOGETHER = {"cpu": 64, "cuda": 512}
"""Vectors of a class in one product."""
UNIT = 32
"""Whole numbers that a typical error of the most wrong coordinate spans where streams are compared."""


@dataclass(frozen=True)
class TransformCode:
    """A trained code; what it computes with is on one device, groups and bits are on the CPU."""

    group_C: Tensor
    """int64: the group of each class."""
    mean_CD: Tensor
    to_CDD: Tensor
    """Centred vectors times this are coordinates of variance 1."""
    from_CDD: Tensor
    """Its inverse."""
    bits_CD: Tensor
    """uint8: bits of each coordinate."""
    scale_CD: Tensor
    """float32: what an error of 1 in a coordinate costs, square root, in the unit of its group's search."""
    tables: Tensor
    """float32 [9, S]: the trellis' tables by bits."""

    @classmethod
    def train(cls, vectors_CND: Tensor, weights_CDD: Tensor, group_C: Tensor, code_bytes: int) -> Self:
        """The code for vectors like these with ``code_bytes`` bytes a vector on average over each group's classes.

        It is the least wrong by ``weights_CDD``.
        """
        mean_CD = vectors_CND.mean(1)
        root, inverse_root = _roots(weights_CDD)
        weighted = (vectors_CND - mean_CD[:, None]) @ root
        variance_CD, axes = torch.linalg.eigh(weighted.transpose(1, 2) @ weighted / vectors_CND.shape[1])
        variance_CD = variance_CD.clamp_min(FLOOR * variance_CD.max(-1, keepdim=True).values).clamp_min(1e-30)
        spread = variance_CD.sqrt()[:, None]
        bits_CD, scale_CD = torch.zeros(mean_CD.shape, dtype=torch.uint8), torch.zeros_like(mean_CD)
        for chosen_C in (group_C == group for group in group_C.unique()):
            bits_CD[chosen_C] = _share_bits(variance_CD[chosen_C], 8 * code_bytes * int(chosen_C.sum()))
            error_CD = variance_CD[chosen_C] * torch.tensor(NORMAL_ERRORS)[bits_CD[chosen_C].int()]
            scale_CD[chosen_C] = variance_CD[chosen_C].sqrt() * UNIT / error_CD[bits_CD[chosen_C] > 0].max().sqrt()
        code = cls(group_C, mean_CD, (root @ axes / spread).contiguous(),
                   ((axes * spread).transpose(1, 2) @ inverse_root).contiguous(), bits_CD, scale_CD,
                   trellis.start_tables())
        code._fit_tables(vectors_CND)
        return code

    def to(self, device: torch.device) -> Self:
        """The same code on ``device``."""
        names = ("mean_CD", "to_CDD", "from_CDD", "scale_CD", "tables")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def encode(self, group: int, vectors_CND: Tensor) -> Tensor:
        """Codes uint8 [N, B] of vectors of a group's classes, one of each class in a code."""
        tables_TS, bits = self._whole_tables(group), self._order(group)[1]
        codes = [trellis.pack(trellis.search(self._numbers(group, part), tables_TS, bits), bits)
                 for part in vectors_CND.split(trellis.CHUNK, dim=1)]
        return torch.cat(codes)

    def decode(self, group: int, codes_NB: Tensor) -> Tensor:
        """Vectors, float32 [C, N, D], that the codes of a group stand for."""
        ends, rows, from_CDD, mean_CD1 = self._decoding(group)
        coordinates = trellis.look_up(codes_NB, ends, rows, self.tables)
        coordinates_CDN = coordinates.view(*from_CDD.shape[:2], len(codes_NB))
        # products of one shape, filled up with 0, so that last bits do not depend on how many are decoded
        together = DECODED_TOGETHER[codes_NB.device.type]
        padded = torch.nn.functional.pad(coordinates_CDN, (0, -len(codes_NB) % together))
        parts = [torch.baddbmm(mean_CD1, from_CDD, part) for part in padded.split(together, 2)]
        return torch.cat(parts, 2)[..., : len(codes_NB)].transpose(1, 2)

    def _decoding(self, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a group's coordinates, the bits before which their codes end, and their own bits; of its classes, the
        transposed transform [C, D, D] and mean [C, D, 1] of decoding."""
        if group not in self._of_groups:
            chosen_C = self.group_C == group
            bits_CD = self.bits_CD[chosen_C]
            order_T, bits = self._order(group)
            ends = torch.zeros(bits_CD.numel(), dtype=torch.int64)
            ends[order_T] = torch.tensor(bits).cumsum(0)
            self._of_groups[group] = (ends, bits_CD.flatten().long(), self.from_CDD[chosen_C].transpose(1, 2),
                                      self.mean_CD[chosen_C][..., None])
        return self._of_groups[group]

    @functools.cached_property
    def _of_groups(self) -> dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
        return {}

    def _order(self, group: int) -> tuple[Tensor, list[int]]:
        """Places of a group's coordinates in the order of their codes, most bits first, and their bits."""
        bits, order = self.bits_CD[self.group_C == group].flatten().sort(descending=True, stable=True)
        bits = bits[bits > 0]
        return order[: len(bits)], bits.tolist()

    def _numbers(self, group: int, vectors_CND: Tensor) -> Tensor:
        """Coordinates as whole numbers, float32 [T, N], in the order of their codes."""
        chosen_C = self.group_C == group
        # in float64, so that how many vectors are encoded together shows in no rounded number
        centred = vectors_CND.double() - self.mean_CD[chosen_C].double()[:, None]
        numbers_CND = centred @ (self.to_CDD[chosen_C].double() * self.scale_CD[chosen_C].double()[:, None])
        return numbers_CND.round().float().transpose(1, 2).flatten(0, 1)[self._order(group)[0]]

    def _whole_tables(self, group: int) -> Tensor:
        """The table of each coordinate in the unit of its group's search, float32 [T, S]."""
        order_T, bits = self._order(group)
        scale_T = self.scale_CD[self.group_C == group].flatten()[order_T]
        return (self.tables[torch.tensor(bits)] * scale_T[:, None]).round()

    def _fit_tables(self, vectors_CND: Tensor) -> None:
        """Fit the tables to vectors: in turn, the best streams, and the means of what each entry stands for."""
        coded = int((self.bits_CD > 0).sum())
        step = max(1, vectors_CND.shape[1] * coded // TABLE_SAMPLE)
        groups = self.group_C.unique().tolist()
        numbers = [self._numbers(group, vectors_CND[self.group_C == group, ::step]) for group in groups]
        for _ in range(TABLE_STEPS):
            entries, values = [], []
            for group, numbers_TN in zip(groups, numbers, strict=True):
                order_T, bits = self._order(group)
                states_TN = trellis.search(numbers_TN, self._whole_tables(group), bits)
                entries.append((states_TN + STATES * torch.tensor(bits)[:, None]).flatten())
                scale_T = self.scale_CD[self.group_C == group].flatten()[order_T]
                values.append((numbers_TN / scale_T[:, None]).flatten())
            every, table = torch.cat(entries), self.tables.flatten()
            number = torch.bincount(every, minlength=len(table))
            total = torch.bincount(every, torch.cat(values).double(), minlength=len(table))
            table.copy_((total + TABLE_INERTIA * table) / (number + TABLE_INERTIA))

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
    gain = (variance_CD[..., None] * (errors[:-1] - errors[1:])).flatten()
    taken = gain.argsort(descending=True, stable=True)[:total] // MAX_BITS
    return torch.bincount(taken, minlength=variance_CD.numel()).view(variance_CD.shape).to(torch.uint8)
