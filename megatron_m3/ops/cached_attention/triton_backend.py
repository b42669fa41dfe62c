"""Attention of one new token to its cache by Triton kernels, on CUDA or under Triton's interpreter.

RoPE, the two writes and the attention are one launch, or two where few sequences share a card, instead of about ten.
How far each sequence is read stands in device memory, so nothing of a launch changes from step to step, as a CUDA graph
needs it. Letters as in ``reference.py``.
"""

import functools
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention.triton_backend import LARGEST_HEAD, split_head
from megatron_m3.ops.rope.reference import Table
from megatron_m3.ops.triton_support import load_kernels, need_device

WHO, INSTEAD = "model.attention=triton: attention to a cache", "use torch"
PROGRAMS = 256
"""About as many programs share the work, where there are columns enough."""
MOST_PARTS = 16


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernels."""
    return load_kernels("megatron_m3.ops.cached_attention.triton_kernels", WHO, INSTEAD)


def launch_options(dtype: torch.dtype, head_size: int, repeat: int, parts: int, *, heads: bool) -> dict[str, Any]:
    """Arguments that are compiled into the first kernel, and how it is launched."""
    main, tail = split_head(head_size)
    keys = 16 if dtype == torch.float32 else 64 if head_size <= 128 else 32
    return {"REPEAT": repeat, "D": head_size, "MAIN": main, "TAIL": tail, "HEADS": heads,
            "ROWS": max(16, 1 << (repeat - 1).bit_length()), "KEYS": keys, "PARTS": parts,
            "num_warps": 4, "num_stages": 2}


def join_options(head_size: int, repeat: int, parts: int) -> dict[str, Any]:
    """The same of the second kernel."""
    return {"REPEAT": repeat, "D": head_size, "WIDTH": 1 << (head_size - 1).bit_length(), "PARTS": parts,
            "num_warps": 4}


def parts_of(pairs: int, columns: int) -> int:
    """Into how many parts the columns of each pair of a sequence and a key-value head are divided, a power of two."""
    wanted = min(PROGRAMS // pairs, columns // 128, MOST_PARTS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def cached_attention(
    query_BHD: Tensor, key_BGD: Tensor, value_BGD: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor, table: Table,
    lengths_B: Tensor, *, prefix_length: int, mask_BM: Tensor | None = None, hidden_G: Tensor | None = None,
) -> Tensor:
    """See :func:`megatron_m3.ops.cached_attention.reference.cached_attention`; what is not shown is never read.

    The same input gives the same bits.

    Raises:
        UnsupportedError: no Triton, no device that it runs on, or a shape or dtype without a kernel.
    """
    _check(query_BHD, keys_BGTD, values_BGTD)
    (B, H, D), (G, T) = query_BHD.shape, keys_BGTD.shape[1:3]
    out_BHD = torch.empty(B, H, D, dtype=query_BHD.dtype, device=query_BHD.device)
    if not out_BHD.numel():
        return out_BHD
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous()
                         for part in (query_BHD, key_BGD, value_BGD))
    cosine, sine = (part.expand(B, 1, D) for part in table)
    assert cosine.stride() == sine.stride(), "cosines and sines lie apart"
    parts = parts_of(B * G, T)
    sums, (most, total) = out_BHD, (lengths_B, lengths_B)
    if parts > 1:
        sums = out_BHD.new_empty(B, G, parts, H // G, D, dtype=torch.float32)
        most, total = sums.new_empty(2, B, G, parts, H // G)
    options = launch_options(query.dtype, D, H // G, parts, heads=hidden_G is not None)
    slots = 0 if mask_BM is None else mask_BM.shape[1]
    with torch.cuda.device_of(query):
        kernels().attend_kernel[B * G, parts](
            query, key, value, keys_BGTD, values_BGTD, cosine, sine, lengths_B,
            cosine if mask_BM is None else mask_BM, lengths_B if hidden_G is None else hidden_G.view(torch.uint8),
            sums, most, total, query.stride()[:2], key.stride()[:2], value.stride()[:2], keys_BGTD.stride()[:3],
            values_BGTD.stride()[:3], cosine.stride(0), 0 if mask_BM is None else mask_BM.stride(0), G, prefix_length,
            slots, math.log2(math.e) / D**0.5, **options)
        if parts > 1:
            kernels().join_kernel[B * H,](sums, most, total, out_BHD, **join_options(D, H // G, parts))
    return out_BHD


def _check(query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse by name what the kernels cannot do."""
    kernels()
    need_device(query, WHO, INSTEAD)
    assert keys.shape == values.shape, "keys and values of different shapes"
    assert keys.stride(-1) == values.stride(-1) == 1, "columns apart"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or keys.dtype != query.dtype:
        raise UnsupportedError(f"{WHO}: no kernel for queries of {query.dtype} and keys of {keys.dtype}; {INSTEAD}")
    if query.shape[-1] > LARGEST_HEAD or query.shape[-1] % 2:
        raise UnsupportedError(f"model.head_size={query.shape[-1]}: {WHO} takes even ones up to {LARGEST_HEAD}; "
                               f"{INSTEAD}")
    if query.shape[1] % keys.shape[1]:
        raise UnsupportedError(f"model.num_kv_heads={keys.shape[1]}: must divide the {query.shape[1]} query heads")
