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


def step_flops(config: Config, *, prefix_length: int = 0) -> StepFlops:
    """Operations of one step of ``config.training.stage``, for a prefix of ``prefix_length`` tokens."""
    model, sequences = config.model, config.training.global_batch
    length = config.data.sequence_length
    tokens, pairs = prefix_length + length, (prefix_length + length) ** 2 / 2
    layer = projection_flops(model, tokens) + mlp_flops(model, tokens) + attention_flops(model, pairs)
    frozen, both = config.training.frozen_layers, sequences * (1 + BACKWARD)
    # a frozen output projection has a gradient for its input alone
    output = sequences * (1 + (1 if frozen and model.tie_embeddings else BACKWARD)) * output_flops(model, length)
    context = (both * model.num_layers - sequences * BACKWARD * frozen) * layer + output
    if config.training.stage == "warmup":
        return StepFlops(context=context)

    memory, layers = config.memory, config.memory_layers
    references = config.num_references
    reference_tokens = references * memory.reference_length
    reference_pairs = reference_tokens * (prefix_length + memory.reference_length / 2)
    below = projection_flops(model, reference_tokens) + mlp_flops(model, reference_tokens)
    below += attention_flops(model, reference_pairs)
    last = query_flops(model, reference_tokens) + key_value_flops(model, reference_tokens)
    chunks = length // memory.chunk_length
    # chunks with and without a reference are taken to be spread evenly
    read = sum(min(chunk + 1, memory.window) for chunk in range(chunks)) * memory.chunk_length * references / chunks
    frozen = min(frozen, layers[-1])
    return StepFlops(
        context=context,
        references=(both * layers[-1] - sequences * BACKWARD * frozen) * below + both * last,
        selection=sequences * len(layers) * selection_flops(model, references, memory.reference_length),
        reading=both * len(layers) * attention_flops(model, read * memory.num_kept_tokens),
    )
