"""Loss of targets after contexts: with explicit memories, with the references as text, or without.

Legend of shape suffixes: B batch, C chunks (1 here), R references of a line, S sequence, N target tokens or references.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from megatron_m3.errors import ConfigError, M3Error
from megatron_m3.evaluation.examples import Example
from megatron_m3.inference.forward import local_kv_heads, losses_at
from megatron_m3.inference.reading import ChunkMemories, ReadingPlan
from megatron_m3.memory import Codec, ExplicitMemories, encode_references, train_codec
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.layout import trunk_positions
from megatron_m3.model.rope import Rope

CODEC_VECTORS = 1 << 20
"""Keys, and as many values, on which a codec is trained at most."""

Mode = Literal["none", "explicit", "text", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Loss of one example's target."""

    id: str | int
    nll: float
    """Sum over the target's tokens, natural log."""
    tokens: int
    """Tokens of the target."""


class Scorer:
    """Scores examples with one loaded model; memory layers and kept tokens are those of its config."""

    def __init__(self, loaded: LoadedModel, mode: Mode, *, batch_tokens: int = 4096) -> None:
        """``batch_tokens`` bounds the tokens of a pass, padding and references included."""
        self.loaded, self.config, self.mode = loaded, loaded.config, mode
        self.codec: Codec | None = None
        self.reads_memories = mode in ("explicit", "shuffled")
        self.batch_tokens = batch_tokens
        self.newline = loaded.tokenizer.encode("\n")
        self.rope = Rope.of(self.config.model)
        self.device = next(loaded.model.parameters()).device

    def score(self, examples: Sequence[Example], done: Callable[[int], None] = lambda count: None) -> list[Score]:
        """The score of every example, in order; ``done(n)`` is told of every n that are finished.

        Raises:
            M3Error: a loss that is not finite.
        """
        scores: dict[int, Score] = {}
        for places in self._batches(examples):
            batch = [examples[place] for place in places]
            scores.update(zip(places, self._score_batch(batch), strict=True))
            done(len(batch))
        return [scores[place] for place in range(len(examples))]

    def tokens_of(self, example: Example) -> list[int]:
        """All that stands before and in the target, prefix left out where memories are read."""
        if self.mode != "text":
            return [self.loaded.tokenizer.bos_id, *example.context, *example.target]
        references = [token for reference in example.references for token in (*reference, *self.newline)]
        return [*self.loaded.prefix_ids, *references, *example.context, *example.target]

    def _batches(self, examples: Sequence[Example]) -> list[list[int]]:
        """Places of examples of similar length, longest first, each batch within ``batch_tokens`` or of one example."""
        cost = [len(self.tokens_of(one)) + self._reference_tokens(one) for one in examples]
        batches: list[list[int]] = []
        for place in sorted(range(len(examples)), key=lambda place: -cost[place]):
            if batches and cost[batches[-1][0]] * (len(batches[-1]) + 1) <= self.batch_tokens:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches

    def _reference_tokens(self, example: Example) -> int:
        return sum(map(len, example.references)) if self.reads_memories else 0

    @torch.inference_mode()
    def _score_batch(self, examples: Sequence[Example]) -> list[Score]:
        prefix = self.loaded.prefix_ids if self.reads_memories else []
        sequences = [[*prefix, *self.tokens_of(one)][:-1] for one in examples]
        longest, eos = max(map(len, sequences)), self.loaded.tokenizer.eos_id
        tokens_BS = torch.tensor([[*one, *[eos] * (longest - len(one))] for one in sequences], device=self.device)
        plan = ReadingPlan(
            self.rope,
            trunk_positions(len(prefix), self.config.memory.reference_length, longest - len(prefix)).to(self.device),
            prefix_length=len(prefix),
            memories=self._memories(examples) if self.reads_memories else None,
            backend=self.config.model.attention,
        )
        rows, columns, labels = zip(
            *(
                (row, len(tokens) - len(one.target) + place, label)
                for row, (one, tokens) in enumerate(zip(examples, sequences, strict=True))
                for place, label in enumerate(one.target)
            ),
            strict=True,
        )
        rows_N, columns_N, labels_N = (torch.tensor(values, device=self.device) for values in (rows, columns, labels))
        loss_N = losses_at(
            self.loaded.model, tokens_BS, plan, rows_N, columns_N, labels_N, self.config.model.vocab_size
        )
        sums = [float(part.double().sum()) for part in loss_N.split([len(one.target) for one in examples])]
        for one, nll in zip(examples, sums, strict=True):
            if nll != nll or nll == float("inf"):
                raise M3Error(f"line {one.line}: the loss is not finite; the checkpoint has diverged")
        return [Score(id=one.id, nll=nll, tokens=len(one.target)) for one, nll in zip(examples, sums, strict=True)]

    def train_codec(self, factory: str, examples: Sequence[Example], seed: int) -> None:
        """Train a codec on the memories of the examples' own references, or of a uniform sample where there are many.

        From then on memories are read as a bank with this codec gives them back.

        Raises:
            ConfigError: not a codec, or too few references to train it.
        """
        distinct = sorted({tuple(reference) for one in examples for reference in one.references})
        model, memory = self.config.model, self.config.memory
        a_reference = len(self.config.memory_layers) * model.num_kv_heads * memory.num_kept_tokens
        count = min(len(distinct), max(1, CODEC_VECTORS // a_reference))
        sample = np.random.default_rng(seed).choice(len(distinct), count, replace=False)
        memories = self._encode([distinct[place] for place in np.sort(sample)])
        try:
            self.codec = train_codec(factory, memories)
        except ConfigError as error:
            reason, given, _ = str(error).partition("; give a larger codec_sample")
            if not given:
                raise
            raise ConfigError(f"{reason}; give more references in --input, a smaller codec, or auto") from None

    def _encode(self, references: Sequence[Sequence[int]]) -> ExplicitMemories:
        """Memories of references, without the slots that all of them leave empty."""
        longest = max(map(len, references))
        tokens_NR = torch.tensor([[*one, *[0] * (longest - len(one))] for one in references])
        memories = encode_references(self.loaded, tokens_NR, torch.tensor([len(one) for one in references]))
        most = int(memories.num_kept.max())
        return replace(memories, kv=memories.kv[..., :most, :], positions=memories.positions[..., :most])

    def _memories(self, examples: Sequence[Example]) -> ChunkMemories:
        """Every position of a line's context reads all references of the line: one chunk, R references."""
        references = dict.fromkeys(tuple(reference) for one in examples for reference in one.references)
        row_of = {reference: row for row, reference in enumerate(references)}
        rows = [[row_of[tuple(reference)] for reference in one.references] for one in examples]
        memories = self._encode(list(references))
        most = max(map(len, rows))
        return ChunkMemories(
            memories=self.codec.round_trip(memories) if self.codec else memories,
            rows_BCR=torch.tensor([[[*one, *[0] * (most - len(one))]] for one in rows], device=self.device),
            valid_BCR=torch.tensor([[[place < len(one) for place in range(most)]] for one in rows], device=self.device),
            layers={layer: place for place, layer in enumerate(self.config.memory_layers)},
            heads=local_kv_heads(self.config),
        )
