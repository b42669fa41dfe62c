"""What a model is: the shape of its Transformer, and its explicit memory."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_m3.config.checks import check_positive, check_range
from megatron_m3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder-only Transformer (paper section 3.4)."""

    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key-value heads; divides num_heads (grouped-query attention)."""
    head_size: int = 32
    """Numbers in one query, key or value vector."""
    hidden_size: int = 128
    """Width of the residual stream; the paper uses num_heads * head_size."""
    ffn_size: int = 128
    """Width of the gated MLP; the paper uses hidden_size, so that capacity goes to depth and heads."""
    vocab_size: int = 8192
    """Tokens in the vocabulary, before padding."""
    vocab_multiple: int = 128
    """The embedding is padded to a multiple of this, whatever the parallel layout."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """Change of the rotary frequencies for longer texts: none, or that of Llama 3."""
    rope_factor: float = 8.0
    """llama3: low frequencies are divided by this."""
    rope_low_frequency: float = 1.0
    """llama3: frequencies that turn less often than this over rope_original_positions are low."""
    rope_high_frequency: float = 4.0
    """llama3: frequencies that turn more often than this over rope_original_positions stay."""
    rope_original_positions: int = 8192
    """llama3: positions of the model before its change."""
    max_positions: int = 0
    """Positions that the model was made for; 0 where nobody said."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of each head's query and key, before rotation (Qwen3)."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Share the input embedding with the output projection."""
    attention: Literal["auto", "torch", "triton", "te", "reference"] = "auto"
    """Attention backend: torch (fused library kernels, merged), triton (one kernel for trunk and memories, and
    kept tokens chosen without matrices of scores, on CUDA), te (Transformer Engine's fused attention, merged, on CUDA
    in bf16; never run on a card yet), reference (plain, slow, the truth), or auto: triton where it can run, else
    torch; a run says at its start which it is, and why."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 * num_layers)."""

    def __post_init__(self) -> None:
        check_range("model", self, 1, math.inf, "num_layers", "num_heads", "num_kv_heads", "head_size", "hidden_size",
                     "ffn_size", "vocab_size", "vocab_multiple")
        check_positive("model", self, "rope_theta", "norm_epsilon", "init_std", "rope_factor", "rope_low_frequency")
        check_range("model", self, 1, math.inf, "rope_original_positions")
        check_range("model", self, 0, math.inf, "max_positions")
        if not self.rope_low_frequency < self.rope_high_frequency < math.inf:
            raise ConfigError(
                f"model.rope_high_frequency={self.rope_high_frequency}: must be above "
                f"model.rope_low_frequency={self.rope_low_frequency}, and finite"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"model.num_kv_heads={self.num_kv_heads}: must divide model.num_heads={self.num_heads}")
        if self.head_size % 2:
            raise ConfigError(f"model.head_size={self.head_size}: must be even for rotary embeddings")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer, norms included."""
        attention = self.hidden_size * self.head_size * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.ffn_size
        if self.qkv_bias:
            attention += self.head_size * (self.num_heads + 2 * self.num_kv_heads)
        if self.qk_norm:
            attention += 2 * self.head_size
        return attention + mlp + 2 * self.hidden_size

    @property
    def num_non_embedding_parameters(self) -> int:
        """Parameters outside the input embedding and the output projection, norms included."""
        return self.num_layers * self.num_layer_parameters + self.hidden_size


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Explicit memory: which layers hold it, how sparse it is, and how it is read (sections 3.2, 3.3)."""

    layers: str = "first-half"
    """Memory layers, counted from 0: first-half, all, or ranges such as 8-24 or 0-3,6 (both ends included)."""
    heads: str = "all"
    """Memory heads: all key-value heads of the memory layers, or those of each layer, such as 8:0,2;9:1."""
    tokens: str = "8"
    """Tokens kept of a reference for each key-value head: a number, or all."""
    curriculum: float = 0.0
    """Share of the training steps over which the kept tokens fall, by equal factors, from all to memory.tokens."""
    reference_length: int = 128
    """Most tokens in a reference."""
    chunk_length: int = 64
    """Tokens in a chunk, the unit of retrieval."""
    references_per_chunk: int = 5
    """References that a chunk reads at inference."""
    window: int = 5
    """In training a chunk reads the references of this many chunks: its own and those before it (section 3.5)."""
    prefix: str = "Reference:"
    """Text after the BOS in the prefix that stands before every reference and before the context."""
    spread: int = 1
    """Each memory layer and key-value head prefers tokens whose place has its own remainder modulo this, so that
    together they cover a reference; 1 prefers none (the paper)."""
    selection: Literal["softmax", "exp", "value"] = "softmax"
    """Token weights: softmax (section 3.3); exp, the unnormalised sum of the paper's code; or value, softmax times the
    length of the token's value."""
    query_chunk: Literal["own", "previous"] = "own"
    """Text that retrieves for a chunk in training: its own (the paper) or the previous chunk's (honest likelihoods)."""

    def __post_init__(self) -> None:
        check_range("memory", self, 1, 1 << 15, "reference_length")  # places are int16 in a bank
        check_range("memory", self, 1, math.inf, "chunk_length", "references_per_chunk", "window", "spread")
        check_range("memory", self, 0, 1, "curriculum")
        try:
            self.prefix.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"memory.prefix={self.prefix!a}: not UTF-8; give text in UTF-8") from None
        if self.num_kept_tokens < 1:
            raise ConfigError(f"memory.tokens={self.tokens}: must be at least 1, or all")

    @property
    def num_kept_tokens(self) -> int:
        """Tokens kept of a full reference for each key-value head."""
        if self.tokens == "all":
            return self.reference_length
        if not self.tokens.isdecimal():
            raise ConfigError(f"memory.tokens={self.tokens}: give a number, or all")
        return min(int(self.tokens), self.reference_length)

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """The memory layers of a model with ``num_layers`` layers, ascending, counted from 0."""
        if self.layers == "all":
            return tuple(range(num_layers))
        if self.layers == "first-half":
            return tuple(range(max(1, num_layers // 2)))
        chosen: set[int] = set()
        for part in self.layers.split(","):
            ends = part.strip().split("-")
            if len(ends) > 2 or not all(end.isdecimal() for end in ends):
                raise ConfigError(f"memory.layers={self.layers}: give first-half, all, or ranges such as 8-24 or 0-3,6")
            first, last = int(ends[0]), int(ends[-1])
            if first > last:
                raise ConfigError(f"memory.layers={self.layers}: {part.strip()} is reversed; give {last}-{first}")
            if last >= num_layers:
                raise ConfigError(f"memory.layers={self.layers}: the model has layers 0-{num_layers - 1}")
            chosen.update(range(first, last + 1))
        return tuple(sorted(chosen))

    def memory_heads(self, num_layers: int, num_kv_heads: int) -> dict[int, tuple[int, ...]]:
        """The key-value heads that hold memory, ascending, by memory layer."""
        layers = self.memory_layers(num_layers)
        if self.heads == "all":
            return {layer: tuple(range(num_kv_heads)) for layer in layers}
        parts = [part.strip().partition(":") for part in self.heads.split(";")]
        if not all(layer.isdecimal() and all(map(str.isdecimal, heads.split(","))) for layer, _, heads in parts):
            raise ConfigError(f"memory.heads={self.heads}: give all, or the heads of each layer such as 8:0,2;9:1")
        chosen = {int(layer): tuple(sorted({int(head) for head in heads.split(",")})) for layer, _, heads in parts}
        if len(chosen) < len(parts) or set(chosen) != set(layers):
            raise ConfigError(
                f"memory.heads={self.heads}: must name each memory layer once, and no other; memory.layers is "
                f"{self.layers}; give the heads that go with them, or all"
            )
        if max(heads[-1] for heads in chosen.values()) >= num_kv_heads:
            raise ConfigError(f"memory.heads={self.heads}: the model has key-value heads 0-{num_kv_heads - 1}")
        return {layer: chosen[layer] for layer in layers}
