"""Model families: their ``config.json`` (or GGUF metadata) to our ModelConfig and back, and what is refused by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m3.config import ModelConfig
from megatron_m3.errors import ArtifactError, ConfigError, UnsupportedError

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
ROPE_FIELDS = {
    "factor": "rope_factor", "low_freq_factor": "rope_low_frequency", "high_freq_factor": "rope_high_frequency",
    "original_max_position_embeddings": "rope_original_positions",
}
"""Settings of Llama 3's RoPE scaling: transformers' names and ours."""
KINDS: dict[type, tuple[str, ...]] = {
    str: ("model_type", "hidden_act", "rope_type", "type"),
    int: ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
          "original_max_position_embeddings"),
    float: ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    dict: ("rope_parameters", "rope_scaling", "quantization_config"),
    list: ("layer_types",),
}
"""What fields hold that a config may do without."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells a family from Llama."""

    architecture: str
    """Class of transformers."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    qk_norm: bool = False
    """RMSNorm of queries and keys."""
    sliding_window: int | None = None
    """Sliding window of a config that does not say."""
    gguf_interleaved: bool = False
    """llama.cpp reorders the rows of queries and keys for its own rotation."""


FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", gguf_interleaved=True),
    "mistral": Family(architecture="MistralForCausalLM", sliding_window=4096),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True),
}


def family_of(model: ModelConfig, wanted: str = "auto") -> str:
    """The family as which ``model`` can be written.

    Raises:
        ConfigError: no family has its parts, or ``wanted`` has others.
    """
    fitting = [name for name, one in FAMILIES.items() if (one.qkv_bias, one.qk_norm) == (model.qkv_bias, model.qk_norm)]
    if not fitting:
        raise UnsupportedError("model.qkv_bias=true with model.qk_norm=true: no known family has both")
    if wanted == "auto":
        return fitting[0]
    if wanted not in fitting:
        raise ConfigError(f"family={wanted}: the model has other parts; it can be written as {' or '.join(fitting)}")
    return wanted


def read_config(fields: dict[str, Any], where: Path) -> tuple[str, ModelConfig]:
    """Family and shape of a model, from the fields of a ``config.json``.

    Raises:
        UnsupportedError: names the field of a feature that our model does not have.
        ArtifactError: names a field that is missing or cannot be.
    """
    fields = _given(fields, where)
    name = fields.get("model_type", "")
    _refuse(fields, name, where)
    heads = _number(fields, "num_attention_heads", where)
    hidden = _number(fields, "hidden_size", where)
    try:
        return name, ModelConfig(
            num_layers=_number(fields, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_size=fields.get("head_dim") or hidden // heads,
            hidden_size=hidden,
            ffn_size=_number(fields, "intermediate_size", where),
            vocab_size=_number(fields, "vocab_size", where),
            norm_epsilon=float(fields.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=FAMILIES[name].qkv_bias,
            qk_norm=FAMILIES[name].qk_norm,
            max_positions=fields.get("max_position_embeddings", 0),
            **_rope(fields, where),
        )
    except ConfigError as error:
        raise ArtifactError(f"{where}: {error}") from None


def _given(fields: dict[str, Any], where: Path) -> dict[str, Any]:
    """The fields that say something: null is nothing, but a sliding window that is null is none."""
    given = {name: value for name, value in fields.items() if value is not None or name == "sliding_window"}
    for kind, names in KINDS.items():
        for name in names:
            if not isinstance(given.get(name), (kind, int, type(None)) if kind is float else (kind, type(None))):
                raise ArtifactError(f"{where}: {name} cannot be {given[name]!r}; take a complete model")
    return given


def _number(fields: dict[str, Any], name: str, where: Path) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise ArtifactError(f"{where}: {name} is {value!r}, not a number above 0; take a complete model")
    return value


def _refuse(fields: dict[str, Any], name: str, where: Path) -> None:
    """Refuse, by the name of its field, what would change the model's numbers and is not in ours."""
    def refuse(field: str, value: object, reason: str) -> None:
        raise UnsupportedError(f"{where}: {field}={value}: {reason}")

    for field in EXPERTS:
        if fields.get(field):
            refuse(field, fields[field], "mixture of experts is not supported; every MLP is dense")
    if "moe" in name or name == "mixtral":
        refuse("model_type", name, "mixture of experts is not supported; every MLP is dense")
    if name not in FAMILIES:
        refuse("model_type", name or "(none)", f"unknown architecture; known are {', '.join(FAMILIES)}")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown")
        refuse("quantization_config", method, "quantised safetensors are not read; take the model before quantisation")
    for field in ("attention_bias", "mlp_bias"):
        if fields.get(field):
            refuse(field, "true", "biases on attention output or MLP are not supported")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", fields["hidden_act"], "only silu is supported")
    partial = (fields.get("rope_parameters") or {}).get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        refuse("partial_rotary_factor", partial, "every number of a head is rotated; partial rotation is not supported")
    window = fields.get("sliding_window", FAMILIES[name].sliding_window)
    used = name == "mistral" or fields.get("use_sliding_window")
    if used and window and window < (fields.get("max_position_embeddings") or window + 1):
        refuse("sliding_window", window, "sliding-window attention is not supported")
    if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
        refuse("layer_types", "sliding_attention", "sliding-window attention is not supported")


def _rope(fields: dict[str, Any], where: Path) -> dict[str, Any]:
    """Our rotary settings from transformers 5's ``rope_parameters``, or the older rope_theta and rope_scaling."""
    parameters = _given(fields.get("rope_parameters") or fields.get("rope_scaling") or {}, where)
    theta = parameters.get("rope_theta", fields.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default" and not any(isinstance(value, dict) for value in parameters.values()):
        return {"rope_theta": float(theta)}
    if kind != "llama3" or any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedError(f"{where}: rope_type={kind}: RoPE scaling other than llama3 is not supported")
    missing = [name for name in ROPE_FIELDS if name not in parameters]
    if missing:
        raise ArtifactError(f"{where}: rope_scaling lacks {missing[0]}; take a complete model")
    values: dict[str, Any] = {ours: float(parameters[name]) for name, ours in ROPE_FIELDS.items()}
    values["rope_original_positions"] = parameters["original_max_position_embeddings"]
    return {"rope_theta": float(theta), "rope_scaling": "llama3", **values}


def write_config(model: ModelConfig, family: str, dtype: str, max_positions: int, special: dict[str, int],
                 ) -> dict[str, Any]:
    """The fields of a ``config.json`` that transformers of versions 4 and 5 read alike.

    Args:
        model: its shape.
        family: one of :data:`FAMILIES`.
        dtype: torch's name of the weights' type.
        max_positions: longest sequence, where ``model`` does not say.
        special: ids of special tokens, by role.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling == "llama3":
        rope = {"rope_type": "llama3"} | {name: getattr(model, ours) for name, ours in ROPE_FIELDS.items()}
    fields = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": model.max_positions or max_positions,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if model.rope_scaling == "llama3" else None,
        "rope_parameters": rope | {"rope_theta": model.rope_theta},
        "torch_dtype": dtype,
        **{f"{role}_token_id": number for role, number in special.items()},
    }
    if family == "mistral":
        fields["sliding_window"] = None
    if family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = False
    return fields
