"""References that pass through the layers before the context and without a gradient, in steps that spare theirs.

Each pipeline stage first takes the rows ``[references | prefix]`` through its layers up to the last memory layer, and
keeps what its memory layers choose; then the trunk passes alone and reads it. Between stages both travel as one tensor,
the rows of the references' pass first. Nothing of that pass is kept for the backward pass but the memories.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_m3.model.layout import JointLayout


@dataclass(frozen=True, kw_only=True)
class ReferencePass(JointLayout):
    """Attention of the rows ``[references | prefix]``; memory layers leave their memories in ``memories``."""

    def attend(self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """See :class:`megatron_m3.model.attention.AttentionPlan`."""
        references, trunk = self.keep(layer, query_SBHD, key_SBGD, value_SBGD)
        rows = self.attend_in_references(references, trunk), self.attend_in_trunk(trunk, None)
        return torch.cat([part.transpose(0, 1) for part in rows])

    def keep(
        self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Leave the memories of a layer, if it is a memory layer; the rotated rows of references and of the prefix."""
        head = self.num_reference_rows
        references, trunk = self.rotated(head, query_SBHD, key_SBGD, value_SBGD)
        if layer in self.config.memory_layers:
            memories = self.choose(layer, query_SBHD[:head], key_SBGD[:head], *references[1:])
            assert memories is not None, "a pass without references"
            self.memories[layer] = memories
        return references, trunk


def pass_references(
    model: torch.nn.Module, references: Tensor, prefix_BP: Tensor, layout: JointLayout
) -> tuple[JointLayout, Tensor | None]:
    """Take the references through this model chunk, without a gradient.

    Args:
        model: the chunk; what it was given by the stage before is split, and the trunk left to it.
        references: tokens of the references ``[B, N * R]``.
        prefix_BP: tokens of the prefix.
        layout: of the joint sequence.

    Returns:
        The layout of the trunk, with the memories that this chunk's layers read; and the rows that go on to the next
        stage, None after the last memory layer.
    """
    core: GPTModel = unwrap_model(model)
    alone = replace(layout, reference_lengths_BN=None, chunk_references_BC=None, held=None)
    offset, last = get_transformer_layer_offset(core.config, vp_stage=core.vp_stage), layout.config.memory_layers[-1]
    if offset > last:
        return alone, None
    ranks = core.config.tensor_model_parallel_size if core.config.sequence_parallel else 1
    padding = prefix_BP.new_zeros(len(prefix_BP), -prefix_BP.shape[1] % ranks)
    tokens_BS = torch.cat([references, prefix_BP, padding], 1)
    plan = ReferencePass(**vars(layout) | {"context_length": padding.shape[1], "memories": alone.memories})
    if core.pre_process:
        with torch.no_grad():
            given = core.embedding(tokens_BS, None)
    else:
        rows = tokens_BS.shape[1] // ranks
        given = core.decoder.input_tensor[:rows]
        core.set_input_tensor(core.decoder.input_tensor[rows:])
    return alone, _pass_layers(core, given.detach(), plan, offset, last)


@torch.no_grad()
def _pass_layers(core: GPTModel, hidden_SBE: Tensor, plan: ReferencePass, offset: int, last: int) -> Tensor | None:
    """The rows after this chunk's layers; of the last memory layer only queries, keys and values are computed."""
    for index, layer in enumerate(core.decoder.layers, offset):
        if index == last:
            plan.keep(index, *layer.self_attention.get_query_key_value_tensors(layer.input_layernorm(hidden_SBE))[:3])
            return None
        hidden_SBE, _ = layer(hidden_SBE, attention_mask=None, attention_bias=plan)
    return hidden_SBE
