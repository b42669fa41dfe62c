"""Losses at chosen positions of a forward pass, and the kv heads of this process."""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_m3.config import Config
from megatron_m3.model.attention import AttentionPlan
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.selection import local_memory_heads

if TYPE_CHECKING:
    from megatron_m3.memory import Delivery

MAX_LOGITS = 1 << 24
"""Logits held at once when losses are computed."""


def local_kv_heads(config: Config) -> slice:
    """The kv heads that this tensor-parallel rank holds."""
    count = config.model.num_kv_heads // config.parallel.tensor
    first = parallel_state.get_tensor_model_parallel_rank() * count
    return slice(first, first + count)


def delivery(loaded: LoadedModel) -> "Delivery":
    """How the attention of this process wants memories."""
    from megatron_m3.memory import Delivery

    parameter = next(loaded.model.parameters())
    return Delivery(heads=local_kv_heads(loaded.config), device=parameter.device, dtype=parameter.dtype)


def restricted_heads(config: Config, device: torch.device) -> dict[int, Tensor]:
    """Which kv heads of this process read memories, bool [G], for memory layers in which not all do."""
    found = {layer: local_memory_heads(config, layer, device) for layer in config.memory_layers}
    return {layer: heads for layer, heads in found.items() if heads is not None}


def losses_at(
    model: torch.nn.Module,
    tokens_BS: Tensor,
    plan: AttentionPlan,
    rows_N: Tensor,
    columns_N: Tensor,
    labels_N: Tensor,
    vocab_size: int,
) -> Tensor:
    """Negative log-likelihood (natural log, fp32) [N] of ``labels_N`` at the positions, a slice of them at a time."""

    def process(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **unused: Any) -> Tensor:
        count = max(1, MAX_LOGITS // vocab_size)
        losses = []
        for hidden_NE, labels in zip(hidden_states[columns_N, rows_N].split(count), labels_N.split(count), strict=True):
            logits_NV = output_layer(hidden_NE[None], weight=output_weight, runtime_gather_output=True)[0][0]
            scores_NV = logits_NV[:, :vocab_size].float()
            losses.append(torch.nn.functional.cross_entropy(scores_NV, labels, reduction="none"))
        return torch.cat(losses)

    return model(tokens_BS, None, None, extra_block_kwargs={"attention_bias": plan}, output_processor=process)
