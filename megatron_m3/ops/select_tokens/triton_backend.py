"""Weights of tokens by Triton kernels that keep no matrix of scores, on CUDA or under Triton's interpreter.

Letters as in ``reference.py``.
"""

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention.triton_backend import MOST_NUMBERS, split_head
from megatron_m3.ops.select_tokens.reference import Rule
from megatron_m3.ops.triton_support import load_kernels, need_device

WHO = "model.attention=triton: select_tokens"
INSTEAD = "use torch"


@dataclass(frozen=True)
class Tile:
    """How the kernels divide their work; none spills registers."""

    rows: int
    """Queries of a block."""
    keys: int
    """Keys of a block; a reference that fits takes one pass."""
    warps: int
    """Warps of a program."""


def tile_for(dtype: torch.dtype, rule: Rule) -> Tile:
    """The tile for queries and keys of ``dtype``."""
    return Tile(16, 128, 8) if dtype == torch.float32 else Tile(64, 128, 8 if rule == "exp" else 4)


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernels."""
    return load_kernels("megatron_m3.ops.select_tokens.triton_kernels", WHO, INSTEAD)


def constants(tile: Tile, head_size: int, repeat: int) -> dict[str, Any]:
    """Arguments that are compiled into both kernels, and how they are launched."""
    main, tail = split_head(head_size)
    return {"REPEAT": repeat, "D": head_size, "MAIN": main, "TAIL": tail, "ROWS": tile.rows, "KEYS": tile.keys,
            "num_warps": tile.warps, "num_stages": 2}


def token_weights(
    query_NTHD: Tensor, key_NTGD: Tensor, lengths_N: Tensor, rule: Rule = "softmax", value_NTGD: Tensor | None = None
) -> Tensor:
    """See :func:`megatron_m3.ops.select_tokens.reference.token_weights`.

    Equal keys of a reference get equal weights, and neither padding nor the other references change a bit as long as
    a block holds all keys of the longest.

    Raises:
        UnsupportedError: no Triton, no device that it runs on, or a shape or dtype without a kernel.
    """
    module = kernels()
    _check(query_NTHD, key_NTGD)
    query, key = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query_NTHD, key_NTGD))
    (N, T, H, D), G = query.shape, key.shape[2]
    weight_NGT = torch.empty(N, G, T, dtype=torch.float32, device=query.device)
    if not weight_NGT.numel():
        return weight_NGT
    tile = tile_for(query.dtype, rule)
    settings, scale2 = constants(tile, D, H // G), math.log2(math.e) / D**0.5
    is_whole, strides = tile.keys >= T, (query.stride()[:3], key.stride()[:3])
    lse_NHT = weight_NGT
    with torch.cuda.device_of(query):
        if not is_whole and rule != "exp":
            lse_NHT = torch.empty(N, H, T, dtype=torch.float32, device=query.device)
            module.statistics_kernel[N * H, -(-T // tile.rows)](
                query, key, lengths_N, lse_NHT, *strides, T, H, scale2, **settings)
        module.weights_kernel[N * G, -(-T // tile.keys)](
            query, key, lengths_N, lse_NHT, weight_NGT, *strides, T, G, scale2, WHOLE=is_whole, EXP=rule == "exp",
            **settings)
    if rule == "exp":
        return weight_NGT * math.log(2)
    if rule == "value":
        assert value_NTGD is not None, "rule value needs the values"
        return torch.where(weight_NGT.isneginf(), weight_NGT,
                           weight_NGT * value_NTGD.float().norm(dim=-1).transpose(1, 2))
    return weight_NGT


def _check(query: Tensor, key: Tensor) -> None:
    """Refuse by name what the kernels cannot do."""
    heads, head_size = query.shape[2:]
    assert key.shape == (*query.shape[:2], key.shape[2], head_size), "keys of another shape"
    assert key.device == query.device, "tensors on different devices"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or key.dtype != query.dtype:
        raise UnsupportedError(f"{WHO}: no kernel for queries of {query.dtype} and keys of {key.dtype}; {INSTEAD}")
    if head_size > 256:
        raise UnsupportedError(f"model.head_size={head_size}: {WHO} takes up to 256; {INSTEAD}")
    if heads % key.shape[2]:
        raise UnsupportedError(f"model.num_kv_heads={key.shape[2]}: must divide the {heads} query heads")
    if any(sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
           >= MOST_NUMBERS for tensor in (query, key)):
        raise UnsupportedError(f"{WHO}: more numbers in a reference than 32-bit offsets reach; {INSTEAD}")
    need_device(query, WHO, INSTEAD)
