"""Core attention that asks a plan what to do.

megatron-core's layers stay as they are; this module takes the place of their core attention. What is attended, at
which positions, and with which memories is the business of an :class:`AttentionPlan`, which comes with each forward
pass as the block's ``attention_bias`` argument: megatron-core hands it to every layer untouched, also to layers that
are recomputed.
"""

from typing import Any, Protocol

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class AttentionPlan(Protocol):
    """One forward pass's layout of positions, parts and memories.

    Letters: S sequence, B batch, H query heads, G key-value heads (both the local tensor-parallel shard), D head size.
    """

    def attend(self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """Attention output ``[S', B, H, D]`` of layer ``layer`` (from 0); queries and keys come without RoPE.

        The sequence is whole, also under sequence parallelism. ``S'`` is smaller than S where a layer drops rows.
        """


class PlannedAttention(MegatronModule):
    """Core attention (no parameters) that hands queries, keys and values to the forward pass's plan."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: AttentionPlan | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention output ``[S', B, H * D]``; ``attention_bias`` is the plan."""
        assert attention_bias is not None, "call the model with a plan; see model.gpt"
        out_SBHD = attention_bias.attend(self.layer, query, key, value)
        return out_SBHD.reshape(*out_SBHD.shape[:2], -1)
