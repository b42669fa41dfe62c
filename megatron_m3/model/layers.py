"""What a Memory³ layer changes in megatron-core's: core attention, the norm, and the residual where references end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_m3.model.attention import PlannedAttention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight takes part in sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis."""
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def keep_tail(hidden_SBE: Tensor, num_rows: int, sequence_parallel: bool) -> Tensor:
    """The last ``num_rows`` (local) rows of the sequence, across the ranks that share it."""
    if hidden_SBE.shape[0] == num_rows:
        return hidden_SBE
    if not sequence_parallel:
        return hidden_SBE[-num_rows:]
    whole = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBE, tensor_parallel_output_grad=False)
    ranks = whole.shape[0] // hidden_SBE.shape[0]
    return tensor_parallel.scatter_to_sequence_parallel_region(whole[-num_rows * ranks :].contiguous())


def add_to_trunk(sequence_parallel: bool) -> Callable[..., Any]:
    """The residual add; where attention returned the trunk alone, the references end here.

    So the last memory layer computes no attention output, no projection and no MLP for references.
    """

    def get_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor]:
        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            assert bias is None, "projections into the residual stream have no biases"
            assert dropout == 0.0, "the model has no dropout"
            return keep_tail(residual, output.shape[0], sequence_parallel) + output

        return add

    return get_bias_dropout_add


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One Transformer layer: megatron-core's, with planned attention and RMSNorm."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = spec.submodules.self_attention
    head_norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    attention = dataclasses.replace(
        attention,
        submodules=dataclasses.replace(attention.submodules, core_attention=PlannedAttention, **head_norms),
    )
    submodules = dataclasses.replace(
        spec.submodules,
        self_attention=attention,
        self_attn_bda=add_to_trunk(config.sequence_parallel),
        mlp_bda=add_to_trunk(config.sequence_parallel),
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
    )
    return dataclasses.replace(spec, submodules=submodules)


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * num_layers, layer_norm=RMSNorm)
