"""Metadata of a GGUF file in the words of a ``config.json``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m3.config import ModelConfig
from megatron_m3.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

FIELDS = {
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta", "attention.sliding_window": "sliding_window", "expert_count": "num_experts",
}
"""GGUF's names after the architecture's, and those of a config.json."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""RoPE scaling of every Llama 3 model; GGUF stores only what comes of it."""


def gguf_fields(reader: "GGUFReader", where: Path) -> dict[str, Any]:
    """The fields that :func:`ckpt_convert.families.read_config` reads, without RoPE scaling.

    Raises:
        UnsupportedError: names metadata of a feature that our model does not have.
    """
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    architecture = str(values.get("general.architecture", ""))
    if values.get("split.count", 0) > 1:
        raise UnsupportedError(f"{where}: split.count={values['split.count']}: join the parts with llama-gguf-split")
    found: dict[str, Any] = {"model_type": architecture}
    for name, theirs in FIELDS.items():
        if f"{architecture}.{name}" in values:
            found[theirs] = values[f"{architecture}.{name}"]
    for name, value in found.items():
        if isinstance(value, list):
            raise UnsupportedError(f"{where}: {name} differs between layers; all layers must be alike")
        if isinstance(value, float):
            found[name] = float(f"{value:.7g}")  # stored in single precision
    # llama.cpp takes a factor without a type for a linear one, under an older name too
    factor = values.get(f"{architecture}.rope.scaling.factor", values.get(f"{architecture}.rope.scale_linear", 1))
    scaling = values.get(f"{architecture}.rope.scaling.type", "none" if factor in (0, 1) else "linear")
    if scaling != "none":
        raise UnsupportedError(f"{where}: rope.scaling.type={scaling}: RoPE scaling other than llama3 is not supported")
    head = found.get("head_dim") or found.get("hidden_size", 0) // (found.get("num_attention_heads") or 1)
    for name in ("rope.dimension_count", "attention.value_length"):
        if values.get(f"{architecture}.{name}", head) != head:
            raise UnsupportedError(f"{where}: {name}={values[f'{architecture}.{name}']}: must be the head's {head}")
    found["use_sliding_window"] = bool(found.get("sliding_window"))
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise ArtifactError(f"{where}: token_embd.weight is missing; take a complete model")
    found["vocab_size"] = int(names["token_embd.weight"].shape[1])
    found["tie_word_embeddings"] = "output.weight" not in names
    return found


def llama3_scaling(factors: "torch.Tensor", model: ModelConfig, where: Path) -> dict[str, Any]:
    """The ``rope_scaling`` of a config.json from the tensor ``rope_freqs.weight``, by which frequencies are divided.

    Raises:
        UnsupportedError: it is not that of a Llama 3 model.
    """
    import dataclasses

    import torch

    from ckpt_convert.families import ROPE_FIELDS
    from megatron_m3.model.rope import Rope

    scaling = LLAMA3 | {"rope_type": "llama3", "factor": float(factors.max())}
    changes: dict[str, Any] = {ours: scaling[name] for name, ours in ROPE_FIELDS.items()}
    scaled = dataclasses.replace(model, rope_scaling="llama3", **changes)
    expected = Rope(model.head_size, model.rope_theta).frequency / Rope.of(scaled).frequency
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise UnsupportedError(f"{where}: rope_freqs.weight: RoPE scaling other than llama3 is not supported")
    return scaling
