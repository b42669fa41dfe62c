"""Loss of targets after contexts: with explicit memories, with the references as text, or without.

Legend of shape suffixes: B batch, C chunks (1 here), R references of a line, N references.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from megatron_m3.config import Config
from megatron_m3.errors import ConfigError
from megatron_m3.evaluation.examples import Example
from megatron_m3.evaluation.questions import Questions, batches
from megatron_m3.inference.context import warn_beyond_context
from megatron_m3.inference.forward import local_kv_heads, losses_at, restricted_heads
from megatron_m3.inference.reading import ChunkMemories, ReadingPlan
from megatron_m3.memory import (
    Codec,
    ExplicitMemories,
    encode_variants,
    held_lists,
    measure_sensitivity,
    train_codec,
)
from megatron_m3.memory.sensitivity import Sensitivity
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.layout import trunk_positions
from megatron_m3.model.rope import Rope
from megatron_m3.ops.choice import choose_backend

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


def distinct_references(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """The references of some examples, each once, in order of appearance."""
    return list(dict.fromkeys(tuple(reference) for one in examples for reference in one.references))


def encode_texts(
    loaded: LoadedModel, references: Sequence[Sequence[int]], configs: Sequence[Config]
) -> list[ExplicitMemories]:
    """Memories of references under several settings, without the slots that all references leave empty."""
    longest = max(map(len, references))
    tokens_NR = torch.tensor([[*one, *[0] * (longest - len(one))] for one in references])
    return [
        replace(variant, kv=variant.kv[..., :most, :], positions=variant.positions[..., :most])
        for variant in encode_variants(loaded, tokens_NR, torch.tensor([len(one) for one in references]), configs)
        for most in [int(variant.num_kept.max())]
    ]


def memories_of_lines(
    config: Config, examples: Sequence[Example], memories: ExplicitMemories, device: torch.device
) -> ChunkMemories:
    """Every position of a line's context reads all references of the line: one chunk, R references.

    ``memories`` are those of :func:`distinct_references`; they are brought to ``device`` once, not layer by layer.
    """
    row_of = {reference: row for row, reference in enumerate(distinct_references(examples))}
    rows = [[row_of[tuple(reference)] for reference in one.references] for one in examples]
    most = max(map(len, rows))
    return ChunkMemories(
        memories=memories.to(device, memories.kv.dtype),
        rows_BCR=torch.tensor([[[*one, *[0] * (most - len(one))]] for one in rows], device=device),
        valid_BCR=torch.tensor([[[place < len(one) for place in range(most)]] for one in rows], device=device),
        layers={layer: place for place, layer in enumerate(config.memory_layers)},
        heads=local_kv_heads(config),
        memory_heads=restricted_heads(config, device),
    )


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
        self.device = loaded.device

    def score(self, examples: Sequence[Example], done: Callable[[int], None] = lambda count: None) -> list[Score]:
        """The score of every example, in order; ``done(n)`` is told of every n that are finished.

        Raises:
            M3Error: a loss that is not finite.
        """
        scores: dict[int, Score] = {}
        for places in self.batches(examples):
            batch = [examples[place] for place in places]
            scores.update(zip(places, self.score_batch(batch), strict=True))
            done(len(batch))
        return [scores[place] for place in range(len(examples))]

    def tokens_of(self, example: Example) -> list[int]:
        """All that stands before and in the target, prefix left out where memories are read."""
        if self.mode != "text":
            return [self.loaded.tokenizer.bos_id, *example.context, *example.target]
        references = [token for reference in example.references for token in (*reference, *self.newline)]
        return [*self.loaded.prefix_ids, *references, *example.context, *example.target]

    def warn_of_long(self, examples: Sequence[Example]) -> None:
        """See :func:`.warn_beyond_context`."""
        lengths = [len(self.tokens_of(one)) for one in examples]
        warn_beyond_context(self.loaded, lengths, reads_memories=self.reads_memories, mend="shorten the lines")

    def batches(self, examples: Sequence[Example]) -> list[list[int]]:
        """Places of examples of similar length, longest first, each batch within ``batch_tokens`` or of one example."""
        references = [sum(map(len, one.references)) if self.reads_memories else 0 for one in examples]
        costs = [len(self.tokens_of(one)) + more for one, more in zip(examples, references, strict=True)]
        return batches(costs, self.batch_tokens)

    @torch.inference_mode()
    def score_batch(
        self, examples: Sequence[Example], memories: ExplicitMemories | None = None, *,
        plan: Callable[..., ReadingPlan] = ReadingPlan,
    ) -> list[Score]:
        """The scores of one batch; ``memories``, if given, are those of its :func:`distinct_references`, uncompressed.

        ``plan`` makes the pass's plan, from the arguments of :class:`ReadingPlan`.

        Raises:
            M3Error: a loss that is not finite.
        """
        prefix = self.loaded.prefix_ids if self.reads_memories else []
        whole = [[*prefix, *self.tokens_of(one)] for one in examples]
        questions = Questions.of(examples, whole, self.loaded.tokenizer.eos_id, self.device)
        num_context = questions.tokens_BS.shape[1] - len(prefix)
        reading = plan(
            self.rope,
            trunk_positions(len(prefix), self.config.memory.reference_length, num_context).to(self.device),
            prefix_length=len(prefix),
            memories=self._memories(examples, memories) if self.reads_memories else None,
            backend=choose_backend(self.config.model).name,
        )
        loss_N = losses_at(
            self.loaded.model, questions.tokens_BS, reading, questions.rows_N, questions.columns_N, questions.labels_N,
            self.config.model.vocab_size,
        )
        return [
            Score(id=one.id, nll=nll, tokens=len(one.target))
            for one, nll in zip(examples, questions.sums(loss_N), strict=True)
        ]

    def _memories(self, examples: Sequence[Example], memories: ExplicitMemories | None) -> ChunkMemories:
        if memories is None:
            memories = encode_texts(self.loaded, distinct_references(examples), [self.config])[0]
        if self.codec:
            memories = self.codec.round_trip(memories)
        return memories_of_lines(self.config, examples, memories, self.device)

    def draw_sample(self, examples: Sequence[Example], seed: int) -> "CodecSample":
        """Memories of the examples' own references, or of a uniform sample where there are many."""
        distinct = sorted(distinct_references(examples))
        num_lists = sum(map(len, self.config.memory_heads.values()))
        count = min(len(distinct), max(1, CODEC_VECTORS // (num_lists * self.config.memory.num_kept_tokens)))
        sample = np.random.default_rng(seed).choice(len(distinct), count, replace=False)
        drawn = [distinct[place] for place in np.sort(sample)]
        return CodecSample(self.loaded, drawn, encode_texts(self.loaded, drawn, [self.config])[0])

    def train_codec(self, factory: str, sample: "CodecSample") -> None:
        """Train a codec; from then on memories are read as a bank with this codec gives them back.

        Raises:
            ConfigError: not a codec, or too few references to train it.
        """
        held_LG = held_lists(self.config.memory_heads, self.config.model.num_kv_heads)
        try:
            self.codec = train_codec(factory, sample.memories, held_LG=held_LG, sensitivity=sample.sensitivity)
        except ConfigError as error:
            reason, given, _ = str(error).partition("; give a larger codec_sample")
            if not given:
                raise
            raise ConfigError(f"{reason}; give more references in --input, a smaller codec, or auto") from None


class CodecSample:
    """What codecs are trained on."""

    def __init__(self, loaded: LoadedModel, references: Sequence[Sequence[int]], memories: ExplicitMemories) -> None:
        self.loaded, self.references, self.memories = loaded, references, memories
        self._sensitivity: Sensitivity | None = None

    def sensitivity(self) -> Sensitivity:
        """What readers notice, measured when first asked for."""
        if self._sensitivity is None:
            self._sensitivity = measure_sensitivity(self.loaded, self.references)
        return self._sensitivity
