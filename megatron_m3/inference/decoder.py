"""The forward pass of generation: the weights of megatron-core's modules, with the fewest operations a layer.

Training needs what megatron-core's modules do around each product: hooks, autograd, biases apart, sequence parallelism.
Generation does not, and one token takes so little arithmetic that all of it would be felt. The result is the model's to
rounding, on any number of tensor-parallel processes.

Legend of shape suffixes: B batch, S sequence, N = B * S rows, E hidden size, V vocabulary, H query heads, G kv heads,
R heads of a group (its query heads, its key, its value), D head size, F size of the MLP.
"""

from collections.abc import Callable

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_m3.config import Config
from megatron_m3.inference.linear import frozen_linear
from megatron_m3.model.attention import AttentionPlan


class Decoder:
    """A whole model (one pipeline stage) that generates; its weights must not change while it lives."""

    def __init__(self, model: GPTModel, config: Config) -> None:
        """On the CPU all products' weights are copied (see :func:`frozen_linear`)."""
        self.vocab_size, self.embed = config.model.vocab_size, model.embedding.word_embeddings
        self.alone = config.parallel.tensor == 1
        self.layers = [_Layer(layer, index, alone=self.alone) for index, layer in enumerate(model.decoder.layers)]
        self.norm = model.decoder.final_layernorm
        tied = model.share_embeddings_and_output_weights
        self.project = frozen_linear(self.embed.weight if tied else model.output_layer.weight)

    def __call__(self, tokens_BS: Tensor, plan: AttentionPlan, columns_B: Tensor | None = None) -> Tensor:
        """Logits ``[B, vocab_size]`` at one position of each sequence, gathered over tensor-parallel ranks.

        ``columns_B`` are these positions; None where there is but one.
        """
        B, S = tokens_BS.shape
        hidden_BSE, chosen_B = self.embed(tokens_BS), None
        if columns_B is not None:
            chosen_B = columns_B + torch.arange(0, B * S, S, device=columns_B.device)
        for layer in self.layers:
            last = layer is self.layers[-1]
            hidden_BSE = layer(hidden_BSE, plan, chosen_B if last else None)
        logits_BV = self.project(self.norm(hidden_BSE.flatten(0, 1)))
        if not self.alone:
            logits_BV = gather_from_tensor_model_parallel_region(logits_BV)
        return logits_BV[:, : self.vocab_size]


class _Layer:
    """One Transformer layer."""

    def __init__(self, layer: TransformerLayer, index: int, *, alone: bool) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self.index = index
        self.groups, self.head_size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.query_norm, self.key_norm = attention.q_layernorm, attention.k_layernorm
        self.qkv = frozen_linear(attention.linear_qkv.weight, attention.linear_qkv.bias)
        self.out, self.down = _summed(attention.linear_proj.weight, alone), _summed(mlp.linear_fc2.weight, alone)
        self.gate_up = frozen_linear(mlp.linear_fc1.weight)

    def __call__(self, hidden_BSE: Tensor, plan: AttentionPlan, chosen_N: Tensor | None) -> Tensor:
        """What the layer leaves, ``[B, S, E]``; of the rows ``chosen_N`` alone, ``[N, 1, E]``, if they are given."""
        B, S, E = hidden_BSE.shape
        hidden_NE = hidden_BSE.view(B * S, E)
        read_NE = self._attend(hidden_BSE, plan)
        if chosen_N is not None:
            hidden_NE, read_NE, S = hidden_NE[chosen_N], read_NE[chosen_N], 1
        hidden_NE = self.out(read_NE).add_(hidden_NE)
        gate_NF, up_NF = self.gate_up(self.mlp_norm(hidden_NE)).chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate_NF).mul_(up_NF)).add_(hidden_NE).view(-1, S, E)

    def _attend(self, hidden_BSE: Tensor, plan: AttentionPlan) -> Tensor:
        """The attention's output ``[N, H * D]``."""
        B, S, E = hidden_BSE.shape
        heads_BSGRD = self.qkv(self.attention_norm(hidden_BSE.view(B * S, E))).view(B, S, self.groups, -1,
                                                                                   self.head_size)
        query_SBHD = heads_BSGRD[..., :-2, :].reshape(B, S, -1, self.head_size).transpose(0, 1)
        key_SBGD, value_SBGD = heads_BSGRD[..., -2, :].transpose(0, 1), heads_BSGRD[..., -1, :].transpose(0, 1)
        if self.query_norm is not None:
            query_SBHD, key_SBGD = self.query_norm(query_SBHD), self.key_norm(key_SBGD)
        return plan.attend(self.index, query_SBHD, key_SBGD, value_SBGD).transpose(0, 1).reshape(B * S, -1)


def _summed(weight_OI: Tensor, alone: bool) -> Callable[[Tensor], Tensor]:
    """The product with a weight of which every tensor-parallel rank holds some inputs."""
    product = frozen_linear(weight_OI)
    return product if alone else lambda rows_NI: reduce_from_tensor_model_parallel_region(product(rows_NI))
