"""What a Memory³ layer changes in megatron-core's: core attention, the norm, and the residual where references end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_m3.errors import UnsupportedError
from megatron_m3.model.attention import PlannedAttention
from megatron_m3.ops.memory_attention.te_backend import need_release
from megatron_m3.platform import select


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
    """The last ``num_rows`` (local) rows of the sequence, across the ranks that share it.

    Under sequence parallelism each row that stays goes to the one rank that has it next; the others go nowhere.
    """
    held = hidden_SBE.shape[0]
    if held == num_rows:
        return hidden_SBE
    if not sequence_parallel:
        return hidden_SBE[-num_rows:]
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = group.rank(), group.size()
    dropped = (held - num_rows) * ranks
    before = [range(one * held, (one + 1) * held) for one in range(ranks)]
    after = [range(dropped + one * num_rows, dropped + (one + 1) * num_rows) for one in range(ranks)]
    sent = [_shared_rows(before[rank], wanted) for wanted in after]
    received = [_shared_rows(there, after[rank]) for there in before]
    return tensor_parallel.all_to_all(group, hidden_SBE[held - sum(sent) :], received, sent)


def _shared_rows(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))


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


def check_transformer_engine() -> None:
    """Refuse Transformer Engine's modules where they cannot be built.

    Raises:
        UnsupportedError: no CUDA device, or Transformer Engine is missing or is another release.
    """
    who, instead = "training.transformer_impl=transformer_engine", "set it to local"
    if not select().is_cuda:
        raise UnsupportedError(f"{who}: Transformer Engine computes on CUDA devices alone; {instead}")
    need_release(who, instead)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One Transformer layer: megatron-core's, with planned attention and RMSNorm.

    With ``transformer_impl`` transformer_engine its linear layers, into which the norms before them are fused; norms of
    heads are RMSNorm in either case. Weights have the same names in checkpoints.

    Raises:
        UnsupportedError: Transformer Engine is asked for where it cannot be used.
    """
    norms: dict[str, Any] = {"input_layernorm": RMSNorm, "pre_mlp_layernorm": RMSNorm}
    if config.transformer_impl == "transformer_engine":
        check_transformer_engine()
        spec, norms = get_gpt_layer_with_transformer_engine_spec(), {}
    else:
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
        **norms,
    )
    return dataclasses.replace(spec, submodules=submodules)


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * num_layers, layer_norm=RMSNorm)
