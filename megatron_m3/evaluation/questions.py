"""Sequences that end in a target, as a padded batch, and the loss of their targets.

Legend of shape suffixes: B sequences, S positions, N target tokens of all sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_m3.errors import M3Error
from megatron_m3.evaluation.examples import Example


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A batch of sequences without their last token, and the positions that predict their targets."""

    examples: Sequence[Example]
    tokens_BS: Tensor
    rows_N: Tensor
    """Sequence of each target token."""
    columns_N: Tensor
    """Position that predicts it."""
    labels_N: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], whole: Sequence[list[int]], padding: int, device: torch.device) -> Self:
        """``whole`` holds each example's sequence, its target at the end."""
        longest = max(map(len, whole)) - 1
        places = [
            (row, len(tokens) - 1 - len(one.target) + place, label)
            for row, (one, tokens) in enumerate(zip(examples, whole, strict=True))
            for place, label in enumerate(one.target)
        ]
        rows_N, columns_N, labels_N = torch.tensor(places, device=device).unbind(1)
        padded = [[*tokens[:-1], *[padding] * (longest + 1 - len(tokens))] for tokens in whole]
        tokens_BS = torch.tensor(padded, device=device)
        return cls(examples=examples, tokens_BS=tokens_BS, rows_N=rows_N, columns_N=columns_N, labels_N=labels_N)

    def sums(self, loss_N: Tensor) -> list[float]:
        """The loss of each example's target, summed over its tokens.

        Raises:
            M3Error: one that is not finite.
        """
        parts = loss_N.double().cpu().split([len(one.target) for one in self.examples])
        sums = [float(part.sum()) for part in parts]
        for one, nll in zip(self.examples, sums, strict=True):
            if nll != nll or nll == float("inf"):
                raise M3Error(f"line {one.line}: the loss is not finite; the checkpoint has diverged")
        return sums


def batches(costs: Sequence[int], limit: int) -> list[list[int]]:
    """Places of items of similar cost, dearest first, each batch within ``limit`` in all or of one item."""
    found: list[list[int]] = []
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        if found and costs[found[-1][0]] * (len(found[-1]) + 1) <= limit:
            found[-1].append(place)
        else:
            found.append([place])
    return found
