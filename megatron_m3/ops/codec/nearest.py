"""The nearest centroids of many vectors: a quick inexact product finds the few that may be it, float64 decides.

The product is taken in numbers that the machine multiplies fast. What rounding can do to it is bounded, so that the
nearest centroid is always among those that are kept; their distances are then taken exactly enough that the result is
*the* nearest one (the first of several), whatever the product's numbers, the threads or the other vectors of the batch.

Letters: P parts of a vector, each with its own centroids; N vectors, C centroids of a part, F numbers of a part,
K numbers that the product sums, G groups of centroids.
"""

import torch
from torch import Tensor
from torch.nn import functional

TILE = 4096
"""Centroids whose distances are in memory at a time."""
GROUP = 64
"""Centroids whose least distance is looked at first."""
EXACT = 1 << 16
"""Distances that are taken exactly at a time."""
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Numbers that are not negative have the order of the integers of the same bits, which are compared faster."""


class Centroids:
    """Centroids float32 [P, C, F], prepared for search with products in ``dtype``: bfloat16 or float32."""

    def __init__(self, centroids_PCF: Tensor, dtype: torch.dtype) -> None:
        count = centroids_PCF.shape[1]
        self.group = min(GROUP, count)
        exact = functional.pad(centroids_PCF.double(), (0, 0, 0, -count % self.group), value=torch.inf)
        self.exact, self.count = exact.flatten(0, 1), exact.shape[1]
        self.mean_P1F = centroids_PCF.mean(1, keepdim=True)
        centred = centroids_PCF.double() - self.mean_P1F
        half = centred.square().sum(-1, keepdim=True) / 2
        rounded, halves = centred.to(dtype), _split(half, dtype)
        table = torch.cat([-rounded, halves, torch.ones_like(halves)], -1)
        # groups are filled up with the first centroid, as if infinitely far
        table = torch.cat([table, table[:, :1].expand(-1, exact.shape[1] - count, -1)], 1)
        self.tiles_PKC = [tile.transpose(1, 2).contiguous() for tile in table.split(TILE, 1)]
        self.longest_P1 = _above(centred.norm(dim=-1))
        self.rounding_P1 = _above((centred - rounded.double()).norm(dim=-1))
        self.half_rounding_P1 = _above((half - halves.double().sum(-1, keepdim=True)).abs().squeeze(-1))

    @property
    def scores(self) -> int:
        """Numbers that the product makes of one vector at a time."""
        return self.tiles_PKC[0][:, 0].numel()

    def nearest(self, vectors_PNF: Tensor, space: Tensor) -> Tensor:
        """Index of the nearest centroid of every part, int64 [P, N]; ``space`` holds N times :attr:`scores` numbers."""
        parts, rows, _ = vectors_PNF.shape
        left_PNK, error_PN = self._left(vectors_PNF)
        integers = INTEGERS[space.dtype]
        least_PN = torch.full_like(error_PN, torch.iinfo(integers).max, dtype=integers)
        found = []
        for place, tile_PKC in enumerate(self.tiles_PKC):
            scores_PNC = space[: tile_PKC[:, 0].numel() * rows].view(parts, rows, tile_PKC.shape[-1])
            torch.bmm(left_PNK, tile_PKC, out=scores_PNC)
            scores_PNGH = scores_PNC.view(integers).unflatten(-1, (-1, self.group))
            least_PNG = scores_PNGH.amin(-1)
            least_PN = torch.minimum(least_PN, least_PNG.amin(-1))
            limit = self._limit(least_PN, error_PN, space.dtype)
            part, row, group = (least_PNG <= limit[..., None]).nonzero().unbind(1)
            row += part * rows
            near = scores_PNGH.view(-1, self.group).index_select(0, row * least_PNG.shape[-1] + group)
            kept, inside = (near <= limit.view(-1).index_select(0, row)[:, None]).nonzero().unbind(1)
            first = part * self.count + group * self.group + place * TILE
            found.append((row.index_select(0, kept), first.index_select(0, kept) + inside, near[kept, inside]))
        row, centroid, score = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        kept = (score <= limit.view(-1).index_select(0, row)).nonzero().squeeze(1)
        row, centroid = row.index_select(0, kept), centroid.index_select(0, kept)
        nearest_PN = self._decide(vectors_PNF.double().flatten(0, 1), row, centroid).view(parts, rows)
        return nearest_PN - torch.arange(parts, device=nearest_PN.device)[:, None] * self.count

    @staticmethod
    def _limit(least_PN: Tensor, error_PN: Tensor, dtype: torch.dtype) -> Tensor:
        """The largest score that the nearest centroid may have, where ``least_PN`` is the least; bits as integers."""
        # a rounded sum is off by at most half of eps as a share of it, at both ends
        limit_PN = (least_PN.view(dtype).float() + 2 * error_PN) * (1 + 1.5 * torch.finfo(dtype).eps)
        return limit_PN.to(dtype).view(least_PN.dtype)

    def _left(self, vectors_PNF: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied with the table, and how much each row's sums may be off, before they are rounded."""
        dtype, eps = self.tiles_PKC[0].dtype, torch.finfo(torch.float32).eps
        centred = vectors_PNF - self.mean_P1F
        rounded = centred.to(dtype)
        square = centred.square().sum(-1)
        length = square.sqrt()
        lost = (centred - rounded).square().sum(-1).sqrt() + eps * length
        error = lost * self.longest_P1 + (length + lost) * self.rounding_P1 + self.half_rounding_P1
        terms = self.tiles_PKC[0].shape[1] * (length + lost + self.longest_P1).square()
        error = error * (1 + 64 * eps) + 2 * eps * terms
        # sums become half the squared distances, and never negative
        halves = _split((square / 2 * (1 + torch.finfo(dtype).eps ** 2) + error)[..., None], dtype)
        return torch.cat([rounded, torch.ones_like(halves), halves], -1), error

    def _decide(self, vectors: Tensor, row: Tensor, centroid: Tensor) -> Tensor:
        """The nearest among pairs of a row of ``vectors`` and a centroid, int64."""
        pieces = [
            (vectors.index_select(0, some) - self.exact.index_select(0, which)).square_().sum(-1)
            for some, which in zip(row.split(EXACT), centroid.split(EXACT), strict=True)
        ]
        distance = torch.cat(pieces)
        best = distance.new_full((len(vectors),), torch.inf).scatter_reduce_(0, row, distance, "amin")
        won = (distance == best.index_select(0, row)).nonzero().squeeze(1)
        found = row.new_full((len(vectors),), len(self.exact))
        return found.scatter_reduce_(0, row.index_select(0, won), centroid.index_select(0, won), "amin")


def _above(numbers_PC: Tensor) -> Tensor:
    """The largest of each row, float32 [P, 1], rounded up."""
    return (numbers_PC.amax(-1, keepdim=True) * (1 + 1e-6)).float()


def _split(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [..., 1] as sums of two of ``dtype``, [..., 2]; off by less than eps squared of themselves."""
    first = numbers.to(dtype)
    return torch.cat([first, (numbers - first.double()).to(dtype)], -1)


def product_dtype(device: torch.device) -> torch.dtype:
    """Numbers that ``device`` multiplies fastest."""
    if device.type == "cpu":
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
