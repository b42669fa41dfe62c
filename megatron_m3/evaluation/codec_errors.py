"""Errors that codecs make in memories, and in what attention makes of them.

Legend of shape suffixes: T prefix and context, B batch, H query heads, G kv heads, D head size, E hidden, L memory
layers, X key or value, C codecs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_m3.evaluation.examples import Example
from megatron_m3.evaluation.scoring import Scorer, distinct_references, encode_texts, memories_of_lines
from megatron_m3.inference.reading import ChunkMemories, ReadingPlan
from megatron_m3.memory import Codec, ExplicitMemories, held_lists
from megatron_m3.model.checkpoint import LoadedModel


@dataclass(frozen=True, kw_only=True)
class CodecErrors:
    """Squared errors, each as a share of the squared length of what is wrong."""

    keys: float
    values: float
    outputs: float
    """Of what attention adds to the residual stream in a memory layer, behind its output projection, while all layers
    below read exact memories; the mean over memory layers."""


def measure_errors(
    scorer: Scorer, codecs: Sequence[Codec], examples: Sequence[Example],
    done: Callable[[int], None] = lambda count: None,
) -> list[CodecErrors]:
    """The errors of each of ``codecs`` on the references of some lines; ``done(n)`` is told of every n lines.

    All are measured in one pass over the lines, which reads exact memories. Positions that are padding do not count.
    """
    config = scorer.config
    held_LG = held_lists(config.memory_heads, config.model.num_kv_heads)
    wrong_CX, whole_X = torch.zeros(len(codecs), 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    outputs = _OutputErrors(scorer.loaded, len(codecs))
    for places in scorer.batches(examples):
        batch = [examples[place] for place in places]
        exact = encode_texts(scorer.loaded, distinct_references(batch), [config])[0]
        coded = [codec.round_trip(exact) for codec in codecs]
        whole_X += _squares(exact.kv, held_LG)
        wrong_CX += torch.stack([_squares(one.kv - exact.kv, held_LG) for one in coded])
        outputs.count(scorer, batch, exact, coded)
        done(len(batch))
    return [
        CodecErrors(keys=keys, values=values, outputs=output)
        for (keys, values), output in zip((wrong_CX / whole_X).tolist(), outputs.shares(), strict=True)
    ]


def _squares(kv: Tensor, held_LG: Tensor) -> Tensor:
    """Sums of squares of keys and of values in the heads that hold memory, [X]."""
    return kv.transpose(2, 3)[:, held_LG].double().square().sum((0, 1, 3, 4))


class _OutputErrors:
    """Sums of squares of attention outputs and of their errors, by memory layer."""

    def __init__(self, loaded: LoadedModel, num_codecs: int) -> None:
        self.layers = loaded.model.decoder.layers
        shape = len(loaded.config.memory_layers)
        self.wrong_LC = torch.zeros(shape, num_codecs, dtype=torch.float64)
        self.whole_L = torch.zeros(shape, dtype=torch.float64)

    def count(
        self, scorer: Scorer, batch: Sequence[Example], exact: ExplicitMemories, coded: Sequence[ExplicitMemories]
    ) -> None:
        others = [memories_of_lines(scorer.config, batch, one, scorer.device) for one in coded]
        lengths_B = torch.tensor([len(scorer.loaded.prefix_ids) + len(scorer.tokens_of(one)) - 1 for one in batch])

        def plan(*args: Any, **named: Any) -> ReadingPlan:
            return _ComparingPlan(*args, others=others, lengths_B=lengths_B, sums=self, **named)

        scorer.score_batch(batch, exact, plan=plan)

    def add(self, layer: int, exact_NE: Tensor, wrong_CNE: Sequence[Tensor], place: int) -> None:
        """Count what attention in ``layer``, the memory layer at ``place``, gives at some positions, and its errors."""
        projection = self.layers[layer].self_attention.linear_proj.weight
        self.whole_L[place] += (exact_NE @ projection.T).double().square().sum().cpu()
        for number, wrong_NE in enumerate(wrong_CNE):
            self.wrong_LC[place, number] += (wrong_NE @ projection.T).double().square().sum().cpu()

    def shares(self) -> list[float]:
        shares: list[float] = (self.wrong_LC / self.whole_L[:, None]).mean(0).tolist()
        return shares


class _ComparingPlan(ReadingPlan):
    """Reads exact memories, and looks in each memory layer what other memories would have given."""

    def __init__(
        self, *args: Any, others: Sequence[ChunkMemories], lengths_B: Tensor, sums: _OutputErrors, **named: Any
    ) -> None:
        super().__init__(*args, **named)
        self.others, self.lengths_B, self.sums = others, lengths_B, sums

    def attend(self, layer: int, query_TBHD: Tensor, key_TBGD: Tensor, value_TBGD: Tensor) -> Tensor:
        """See :class:`ReadingPlan`."""
        exact_TBHD = super().attend(layer, query_TBHD, key_TBGD, value_TBGD)
        exact = self.memories
        if exact is not None and layer in exact.layers:
            places_T1 = torch.arange(len(exact_TBHD))[:, None]
            valid_TB = ((places_T1 >= self.prefix_length) & (places_T1 < self.lengths_B)).to(exact_TBHD.device)
            wrong = []
            for other in self.others:
                self.memories = other
                other_TBHD = super().attend(layer, query_TBHD, key_TBGD, value_TBGD)
                wrong.append((other_TBHD - exact_TBHD)[valid_TB].flatten(1))
            self.memories = exact
            self.sums.add(layer, exact_TBHD[valid_TB].flatten(1), wrong, exact.layers[layer])
        return exact_TBHD
