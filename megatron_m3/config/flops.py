"""Floating-point operations of a Transformer's parts (appendix A), and of a training step made of them.

A multiply-add counts as two. Attention over ``n`` tokens that see each other causally is ``n * n / 2`` pairs. Norms,
activations, rotary embeddings and the optimizer are not counted.
"""

from dataclasses import dataclass

from megatron_m3.config.model import ModelConfig
from megatron_m3.config.schema import Config

BACKWARD = 2
"""Cost of a backward pass over that of its forward pass; none below the lowest layer that is trained."""


def key_value_flops(model: ModelConfig, tokens: float) -> float:
    """Projections of ``tokens`` to keys and values."""
    return 2 * tokens * model.hidden_size * 2 * model.num_kv_heads * model.head_size


def query_flops(model: ModelConfig, tokens: float) -> float:
    """Projection of ``tokens`` to queries; the projection of the attention output costs the same."""
    return 2 * tokens * model.hidden_size * model.num_heads * model.head_size


def projection_flops(model: ModelConfig, tokens: float) -> float:
    """All four projections of one attention layer."""
    return key_value_flops(model, tokens) + 2 * query_flops(model, tokens)


def attention_flops(model: ModelConfig, pairs: float) -> float:
    """Scores and weighted values of ``pairs`` (query token, key token) in one layer."""
    return 2 * 2 * pairs * model.num_heads * model.head_size


def selection_flops(model: ModelConfig, references: float, reference_length: float) -> float:
    """Scores of every token with every token of each reference in one memory layer (section 3.3)."""
    return 2 * references * reference_length**2 * model.num_heads * model.head_size


def mlp_flops(model: ModelConfig, tokens: float) -> float:
    """One gated MLP."""
    return 2 * tokens * 3 * model.hidden_size * model.ffn_size


def output_flops(model: ModelConfig, tokens: float) -> float:
    """The projection to the vocabulary."""
    return 2 * tokens * model.hidden_size * model.padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Operations of one layer's forward pass over one training sequence."""

    context: float
    """The training tokens and the prefix: all of a warmup step."""
    references: float = 0.0
    """References below the last memory layer; in that layer they need only query, key and value."""
    selection: float = 0.0
    """Token weights in a memory layer; the choice of tokens has no gradient."""
    reading: float = 0.0
    """Context tokens that attend to kept tokens, in a memory layer."""
    backward_factor: float = BACKWARD
    """Cost of the backward pass of all but the selection; 0 in frozen layers."""
    reference_gradient: float = 1.0
    """Share of the steps in which references have a backward pass."""

    @property
    def forward(self) -> float:
        """Everything together."""
        return self.context + self.references + self.selection + self.reading

    @property
    def backward(self) -> float:
        """The backward pass; recomputation is not counted."""
        return self.backward_factor * (self.context + self.reading + self.reference_gradient * self.references)

    @property
    def recomputed(self) -> float:
        """The part of the forward pass that a backward pass repeats where layers are recomputed."""
        return self.context + self.reading + self.reference_gradient * (self.references + self.selection)


@dataclass(frozen=True, kw_only=True)
class ReferenceWork:
    """What references cost one sequence."""

    read: float
    """Chunks that have a reference."""
    encoded: float
    """Different references that are encoded."""
    gradient: float
    """Share of the steps in which they have a backward pass."""
    num_kept: int | None = None
    """Tokens kept of a full reference; by default the config's."""

    @classmethod
    def planned(cls, config: Config) -> "ReferenceWork":
        """What is expected of a run."""
        # a joint sequence has no references in the warmup stage
        read = config.num_references if config.training.stage == "continual" else 0
        every = config.training.reference_gradient_every
        return cls(read=read, encoded=read * (1 - config.data.expected_repeats), gradient=1 / every if every else 0.0)


def layer_flops(config: Config, *, prefix_length: int = 0, work: ReferenceWork | None = None) -> list[LayerFlops]:
    """Each layer's share of one sequence of ``config.training.stage``.

    Args:
        config: of the run.
        prefix_length: tokens of the prefix.
        work: what references cost; by default what is planned.
    """
    work = work or ReferenceWork.planned(config)
    model, memory, last = config.model, config.memory, config.memory_layers[-1]
    length, chunks = config.data.sequence_length, config.data.sequence_length // memory.chunk_length
    num_kept = work.num_kept or memory.num_kept_tokens
    tokens, pairs = prefix_length + length, (prefix_length + length) ** 2 / 2
    context = projection_flops(model, tokens) + mlp_flops(model, tokens) + attention_flops(model, pairs)
    rows = work.encoded * memory.reference_length
    below = projection_flops(model, rows) + mlp_flops(model, rows)
    below += attention_flops(model, rows * (prefix_length + memory.reference_length / 2))
    at_last = query_flops(model, rows) + key_value_flops(model, rows)
    # chunks with and without a reference are taken to be spread evenly
    read = sum(min(chunk + 1, memory.window) for chunk in range(chunks)) * memory.chunk_length * work.read / chunks
    return [
        LayerFlops(
            context=context,
            references=below if layer < last else at_last if layer == last else 0.0,
            selection=selection_flops(model, work.encoded, memory.reference_length) * (layer in config.memory_layers),
            reading=attention_flops(model, read * num_kept) * (layer in config.memory_layers),
            backward_factor=BACKWARD if layer >= config.training.frozen_layers else 0,
            reference_gradient=work.gradient,
        )
        for layer in range(model.num_layers)
    ]


def head_flops(config: Config) -> tuple[float, float]:
    """Operations of the output projection on one sequence: forward, backward."""
    forward = output_flops(config.model, config.data.sequence_length)
    # a frozen output projection has a gradient for its input alone
    frozen = config.training.frozen_layers and config.model.tie_embeddings
    return forward, (1 if frozen else BACKWARD) * forward


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one optimizer step over the global batch, forward and backward; recomputation is not counted."""

    context: float
    """The training tokens themselves: all of a warmup step."""
    references: float = 0.0
    """References through the layers up to the last memory layer, of which they need only query, key and value."""
    selection: float = 0.0
    """Token weights in the memory layers: forward only, since the choice of tokens has no gradient."""
    reading: float = 0.0
    """Context tokens that attend to kept tokens."""

    @property
    def total(self) -> float:
        """Everything together."""
        return self.context + self.references + self.selection + self.reading


def step_flops(config: Config, *, prefix_length: int = 0, work: ReferenceWork | None = None) -> StepFlops:
    """Operations of one step of ``config.training.stage``; arguments as for :func:`layer_flops`."""
    sequences, layers = config.training.global_batch, layer_flops(config, prefix_length=prefix_length, work=work)

    def both(part: str) -> float:
        return sequences * sum((1 + layer.backward_factor) * getattr(layer, part) for layer in layers)

    return StepFlops(
        context=both("context") + sequences * sum(head_flops(config)),
        references=sequences * sum(
            (1 + layer.backward_factor * layer.reference_gradient) * layer.references for layer in layers
        ),
        selection=sequences * sum(layer.selection for layer in layers),
        reading=both("reading"),
    )
