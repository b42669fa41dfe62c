"""Which layers and kv heads read memories with the most gain, measured by leaving them out (remark 4 of section 3.3).

A *unit* is what is kept or left out: a layer with all its heads, or one head of one layer.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m3.evaluation.gated_reading import GatedReading

Unit = tuple[int, ...]
"""(layer,) or (layer, head)."""

TRIED = 3
"""Units on either side that an exchange at the end considers."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A set of units, its loss, and what each unit is worth in it."""

    units: list[Unit]
    """The chosen ones, ascending."""
    loss: float
    """Nats per target token when they, and no others, read memories."""
    saves: dict[Unit, float]
    """What a unit's presence saves: of a chosen one, the loss without it less this loss; of another, this loss less
    that with it added."""
    path: list[tuple[int, float]]
    """Number of units and loss, from all of them down to the chosen ones."""


class Ranking:
    """Backward elimination of units of one kind, then exchanges, by real losses of the same questions."""

    def __init__(self, reading: GatedReading, *, by_head: bool, share: float, done: Callable[[], None]) -> None:
        """``share`` of the remaining units is left out at once; ``done`` is called after each pass."""
        model = reading.config.model
        heads = range(model.num_kv_heads)
        self.reading, self.share, self.done = reading, share, done
        self.shape = (model.num_layers, model.num_kv_heads)
        self.units: list[Unit] = [
            unit for layer in range(model.num_layers) for unit in ([(layer, head) for head in heads] if by_head
                                                                   else [(layer,)])
        ]  # fmt: skip

    def mask(self, units: Collection[Unit]) -> Tensor:
        """The heads of some units, bool [layers, kv heads]."""
        heads_LG = torch.zeros(self.shape, dtype=torch.bool)
        for unit in units:
            heads_LG[unit] = True
        return heads_LG

    def choose(self, target: int, *, rounds: int = 1) -> Choice:
        """The best ``target`` units found."""
        chosen, path = set(self.units), []
        while True:
            loss = self._settle(chosen)
            path.append((len(chosen), loss))
            if len(chosen) <= target:
                break
            without = self._without(chosen)
            ranked = sorted(chosen, key=lambda unit: (without[unit], unit))
            chosen -= set(ranked[: self._dropped(len(chosen), target)])
        saves = self._saves(chosen, loss)
        for _ in range(rounds):
            better = self._exchange(chosen, loss, saves)
            if better is None:
                break
            chosen, loss = better
            saves = self._saves(chosen, loss)
        return Choice(units=sorted(chosen), loss=loss, saves=saves, path=path)

    def planned_passes(self, target: int) -> int:
        """How many passes :meth:`choose` takes at most, with one round of exchanges."""
        count, passes = len(self.units), 2 * len(self.units) + TRIED**2 + 1
        while count > target:
            passes += 1 + count
            count -= self._dropped(count, target)
        return passes + 1

    def _dropped(self, count: int, target: int) -> int:
        return min(count - target, max(1, math.floor(count * self.share)))

    def _settle(self, chosen: Collection[Unit]) -> float:
        loss = self.reading.settle(self.mask(chosen))
        self.done()
        return loss

    def _loss(self, chosen: Collection[Unit]) -> float:
        loss = self.reading.loss(self.mask(chosen))
        self.done()
        return loss

    def _without(self, chosen: set[Unit]) -> dict[Unit, float]:
        return {unit: self._loss(chosen - {unit}) for unit in sorted(chosen)}

    def _saves(self, chosen: set[Unit], loss: float) -> dict[Unit, float]:
        """What every unit saves, chosen or not; ``chosen`` is settled."""
        saves = {unit: value - loss for unit, value in self._without(chosen).items()}
        saves |= {unit: loss - self._loss(chosen | {unit}) for unit in self.units if unit not in chosen}
        return saves

    def _exchange(self, chosen: set[Unit], loss: float, saves: dict[Unit, float]) -> tuple[set[Unit], float] | None:
        """The best exchange of a chosen unit that saves little for another that saves much, if one lowers the loss."""
        out = sorted(chosen, key=lambda unit: (saves[unit], unit))[:TRIED]
        others: Sequence[Unit] = [unit for unit in self.units if unit not in chosen]
        come = sorted(others, key=lambda unit: (-saves[unit], unit))[:TRIED]
        tried = [(self._loss(chosen - {old} | {new}), chosen - {old} | {new}) for old in out for new in come]
        best, units = min(tried, key=lambda pair: pair[0], default=(loss, chosen))
        if best >= loss:
            return None
        self._settle(units)
        return units, best
