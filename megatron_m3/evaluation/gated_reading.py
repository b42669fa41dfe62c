"""Losses of questions when only some key-value heads of some layers read memories.

References are encoded once, in every layer: what a layer keeps changes nothing above it. Hidden states below the lowest
layer that changes are kept, so that most passes run through part of the model.

Legend of shape suffixes: L layers, G kv heads, S sequence, B batch, N target tokens, E hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_m3.config import replace_fields
from megatron_m3.evaluation.examples import Example
from megatron_m3.evaluation.questions import Questions, batches
from megatron_m3.evaluation.scoring import distinct_references, encode_texts, memories_of_lines
from megatron_m3.inference.context import warn_beyond_context
from megatron_m3.inference.reading import ChunkMemories, ReadingPlan
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.layout import trunk_positions
from megatron_m3.model.rope import Rope
from megatron_m3.ops.choice import choose_backend


@dataclass(frozen=True)
class _PlacedMemories(ChunkMemories):
    """Memories whose keys and values already lie as a pass reads them."""

    placed: dict[int, Tensor]

    def key_values(self, layer: int) -> Tensor:
        """See :class:`ChunkMemories`."""
        return self.placed[layer]


@dataclass(kw_only=True)
class _Batch:
    questions: Questions
    memories: _PlacedMemories
    inputs: list[Tensor]
    """Hidden states before each layer, [S, B, E], for the settled heads."""


class GatedReading:
    """Losses of one set of questions for any choice of memory heads; the model is whole on this process."""

    def __init__(
        self, loaded: LoadedModel, examples: Sequence[Example], *, batch_tokens: int = 512,
        done: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Encode the references in every layer; ``done(n)`` is told of every n examples whose references are.

        ``batch_tokens`` bounds the tokens of the questions in a pass; few, so that they are of nearly equal length.
        """
        config = replace_fields(loaded.config, {"memory.layers": "all", "memory.heads": "all"})
        self.loaded, self.config = replace(loaded, config=config), config
        self.device = loaded.device
        self.rope = Rope.of(config.model)
        self.num_tokens = sum(len(one.target) for one in examples)
        self.settled = torch.zeros(config.model.num_layers, config.model.num_kv_heads, dtype=torch.bool)
        self.batches: list[_Batch] = []
        costs = [len(loaded.prefix_ids) + len(one.context) + len(one.target) for one in examples]
        warn_beyond_context(loaded, [1 + len(one.context) + len(one.target) for one in examples], reads_memories=True,
                            mend="shorten the lines")
        with torch.inference_mode():
            for places in batches(costs, batch_tokens):
                self.batches.append(self._prepare([examples[place] for place in places]))
                done(len(places))

    def _prepare(self, examples: Sequence[Example]) -> _Batch:
        """The questions of some examples, and their memories as a pass reads them."""
        loaded = self.loaded
        bos, prefix, dtype = loaded.tokenizer.bos_id, loaded.prefix_ids, next(loaded.model.parameters()).dtype
        whole = [[*prefix, bos, *one.context, *one.target] for one in examples]
        questions = Questions.of(examples, whole, loaded.tokenizer.eos_id, self.device)
        encoded = encode_texts(loaded, distinct_references(examples), [self.config])[0]
        memories = memories_of_lines(self.config, examples, encoded, self.device)
        placed = _PlacedMemories(
            memories=replace(encoded, kv=encoded.kv[:, :, :, :, :, :0]), rows_BCR=memories.rows_BCR,
            valid_BCR=memories.valid_BCR, layers=memories.layers, heads=memories.heads,
            placed={layer: memories.key_values(layer).to(dtype) for layer in memories.layers},
        )
        return _Batch(questions=questions, memories=placed, inputs=[])

    def settle(self, heads_LG: Tensor) -> float:
        """The loss with these heads; later passes start from its hidden states."""
        loss = self._run(heads_LG, keep=True)
        self.settled = heads_LG.clone()
        return loss

    def loss(self, heads_LG: Tensor) -> float:
        """Nats per target token when the heads in ``heads_LG`` (bool) read memories."""
        return self._run(heads_LG, keep=False)

    @torch.inference_mode()
    def _run(self, heads_LG: Tensor, *, keep: bool) -> float:
        changed = (heads_LG != self.settled).any(1).nonzero()
        first = int(changed[0]) if len(changed) and self.batches[0].inputs else 0
        return sum(sum(self._losses(batch, heads_LG, first, keep=keep)) for batch in self.batches) / self.num_tokens

    def _losses(self, batch: _Batch, heads_LG: Tensor, first: int, *, keep: bool) -> list[float]:
        """Losses of a batch's examples; only layers from ``first`` on are run."""
        model = self.loaded.model
        readers = {layer: heads_LG[layer] for layer in range(len(heads_LG)) if heads_LG[layer].any()}
        prefix, rows = len(self.loaded.prefix_ids), batch.questions.tokens_BS.shape[1]
        plan = ReadingPlan(
            self.rope,
            trunk_positions(prefix, self.config.memory.reference_length, rows - prefix).to(self.device),
            prefix_length=prefix,
            memories=replace(batch.memories, layers={layer: layer for layer in readers}, memory_heads=readers),
            backend=choose_backend(self.config.model).name,
        )
        hidden_SBE = batch.inputs[first] if batch.inputs else model.embedding(batch.questions.tokens_BS, None)
        inputs = batch.inputs[:first]
        for layer in model.decoder.layers[first:]:
            inputs.append(hidden_SBE)
            hidden_SBE, _ = layer(hidden_SBE, attention_mask=None, attention_bias=plan)
        if keep:
            batch.inputs = inputs
        return batch.questions.sums(self._target_losses(hidden_SBE, batch.questions))

    def _target_losses(self, hidden_SBE: Tensor, questions: Questions) -> Tensor:
        model, vocab = self.loaded.model, self.config.model.vocab_size
        hidden_NE = model.decoder.final_layernorm(hidden_SBE[questions.columns_N, questions.rows_N])
        weight = model.shared_embedding_or_output_weight() if self.config.model.tie_embeddings else None
        logits_NV = model.output_layer(hidden_NE[None], weight=weight)[0][0]
        return torch.nn.functional.cross_entropy(logits_NV[:, :vocab].float(), questions.labels_N, reduction="none")
