"""Which tokens of its references a memory layer keeps: the config's rule for one layer of a model."""

import functools

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_m3.config import Config
from megatron_m3.ops.choice import choose_backend
from megatron_m3.ops.select_tokens import select_tokens


def select_in_layer(
    config: Config, layer: int, query_NTHD: Tensor, key_NTGD: Tensor, value_NTGD: Tensor, lengths_N: Tensor,
    num_kept: int,
) -> tuple[Tensor, Tensor]:
    """The kept tokens of each reference in memory layer ``layer``, by the config's rule (section 3.2).

    Args:
        config: whose memory section says how.
        layer: a memory layer, counted from 0.
        query_NTHD: queries of the references' tokens before RoPE, this process's heads.
        key_NTGD: keys before RoPE, this process's key-value heads.
        value_NTGD: their values.
        lengths_N: tokens of each reference; later ones are padding.
        num_kept: tokens to keep for each key-value head.

    Returns:
        indices ``[N, G, K]``, ascending; valid ``[N, K]``. See :func:`megatron_m3.ops.select_tokens.select_tokens`.
    """
    memory = config.memory
    preferred_GT = None
    if memory.spread > 1:
        preferred_GT = preferred_tokens(config, layer, key_NTGD.shape[2], key_NTGD.shape[1], key_NTGD.device)
    return select_tokens(query_NTHD, key_NTGD, lengths_N, num_kept, memory.selection, preferred_GT, value_NTGD,
                         choose_backend(config.model).name)


def preferred_tokens(
    config: Config, layer: int, num_local_heads: int, num_tokens: int, device: torch.device
) -> Tensor:
    """Tokens that each key-value head of this process takes first, bool ``[G, T]``: one class modulo ``memory.spread``.

    Heads and memory layers go through the classes in turn, so that together they cover a reference.
    """
    first = parallel_state.get_tensor_model_parallel_rank() * num_local_heads
    place = config.memory_layers.index(layer) * config.model.num_kv_heads
    return _class_of_tokens(place + first, num_local_heads, num_tokens, config.memory.spread, device)


@functools.cache
def _class_of_tokens(turn: int, heads: int, tokens: int, spread: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        turn_G1 = torch.arange(turn, turn + heads, device=device)[:, None]
        return (torch.arange(tokens, device=device) - turn_G1) % spread == 0


def local_memory_heads(config: Config, layer: int, device: torch.device) -> Tensor | None:
    """Which key-value heads of this process hold memory in a memory layer, bool ``[G]``; None where all do."""
    heads = config.memory_heads[layer]
    if len(heads) == config.model.num_kv_heads:
        return None
    count = config.model.num_kv_heads // config.parallel.tensor
    first = parallel_state.get_tensor_model_parallel_rank() * count
    return _flags(tuple(first + head in heads for head in range(count)), device)


@functools.cache
def _flags(values: tuple[bool, ...], device: torch.device) -> Tensor:
    """A bool tensor on ``device``, made once: copying it anew in each layer would wait for the device every time."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
