"""Attention with explicit memory in one pass of Triton kernels: one online softmax over trunk keys and memory slots.

Nothing of the size of the scores is ever in device memory, key-value heads are not repeated, and gradients are the same
in every run. The prefix of references is to these kernels a memory that every token reads, so nothing is copied there.
Runs on CUDA, and on the CPU under Triton's interpreter (``TRITON_INTERPRET=1`` when Triton is first imported).

Letters as in ``reference.py``.
"""

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention.triton_tiles import Tile, place_of, tiles_for
from megatron_m3.ops.triton_support import load_kernels, need_device

WHO, INSTEAD = "model.attention=triton", "use torch"
LARGEST_HEAD = 256
MOST_NUMBERS = 2**31 - 2**20
"""Numbers of one sequence that 32-bit offsets reach, the rows that a block has beyond the last one included."""
FEW_PROGRAMS = 512
"""With fewer programs than this, the query heads of a key-value head are not summed in one program but afterwards."""


def split_head(head_size: int) -> tuple[int, int]:
    """Columns of a tile as two powers of two that hold ``head_size``; the second is smaller or 0, or both are 128."""
    main = min(max(16, 1 << (head_size.bit_length() - 1)), 128)
    rest = max(head_size - main, 0)
    tail = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    return (2 * main, 0) if main < 128 and tail >= main else (main, tail)


@functools.cache
def kernels() -> ModuleType:
    """The module that has all kernels: Triton is first imported when they are first needed."""
    return load_kernels("megatron_m3.ops.memory_attention.triton_backward", WHO, INSTEAD)


def _check(query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor) -> None:
    """Refuse by name what the kernels cannot do; they would not notice shapes that do not belong together."""
    heads, head_size = query.shape[2:]
    others = value, memory_key, memory_value
    assert key.shape == value.shape == (*query.shape[:2], key.shape[2], head_size), "keys and values of other shapes"
    assert memory_key.shape == memory_value.shape, "memory keys and values of different shapes"
    assert (len(memory_key), *memory_key.shape[3:]) == (len(key), *key.shape[2:]), "memories of another shape"
    assert all(tensor.device == query.device for tensor in (key, *others)), "tensors on different devices"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedError(f"model.attention=triton: no kernel for {query.dtype}; use reference")
    if any(tensor.dtype != query.dtype for tensor in (key, *others)):
        raise UnsupportedError("model.attention=triton: queries, keys and values of different dtypes; use torch")
    if head_size > LARGEST_HEAD:
        raise UnsupportedError(f"model.head_size={head_size}: model.attention=triton takes up to {LARGEST_HEAD}; "
                               "use reference")
    if any(tensor[:1].numel() >= MOST_NUMBERS for tensor in (query, memory_key)):
        raise UnsupportedError(
            f"model.attention=triton: {query.shape[1]:,} tokens, {heads} heads of {head_size}: more numbers in a "
            "sequence than 32-bit offsets reach; use torch"
        )
    if heads % key.shape[2]:
        raise UnsupportedError(f"model.num_kv_heads={key.shape[2]}: must divide the {heads} query heads")
    kernels()
    need_device(query, WHO, INSTEAD)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its columns are apart or its rows or heads too far apart for 32-bit offsets."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    return tensor if tensor.stride(-1) == 1 and span < MOST_NUMBERS else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Strides of batch, row and head of each."""
    return [tensor.stride()[:3] for tensor in tensors]


@dataclass(frozen=True)
class _Band:
    """Which memory slots a context position reads."""

    prefix: int
    length: int
    chunks: int
    window: int
    slots: int

    @property
    def arguments(self) -> tuple[int, ...]:
        return self.prefix, self.length, self.chunks, self.window, self.slots


def constants(tile: Tile, head_size: int, repeat: int, slots: int) -> dict[str, Any]:
    """Arguments that are compiled into a kernel, and how it is launched.

    ``repeat`` query heads share a key-value head; a chunk has ``slots`` memory slots.
    """
    main, tail = split_head(head_size)
    return {
        "REPEAT": repeat, "D": head_size, "MAIN": main, "TAIL": tail, "MEMORY": slots > 0,
        "ROWS": tile.rows, "KEYS": tile.keys, "SLOTS": tile.slots,
        "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers,
    }


def _constants(kernel: str, query: Tensor, key: Tensor, slots: int) -> dict[str, Any]:
    """Those for a kernel and its inputs; the interpreter takes the tiles of any card."""
    major, minor = torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)
    tiles, head_size = tiles_for(query.dtype, 10 * major + minor), query.shape[3]
    return constants(tiles[place_of(tiles, kernel, head_size)], head_size, query.shape[2] // key.shape[2], slots)


class _JointSoftmax(torch.autograd.Function):
    """One softmax over causal trunk keys and the band of memory rows ``[B, C * M, G, D]`` of each position."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor,
                valid: Tensor, band: _Band) -> Tensor:
        query, key, value, memory_key, memory_value = map(_rows, (query, key, value, memory_key, memory_value))
        B, T, H, D = query.shape
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(B, H, T, dtype=torch.float32)
        inputs = query, key, value, memory_key, memory_value, valid
        settings = _constants("forward", query, key, band.slots)
        if out.numel():
            grid = B * H, -(-T // settings["ROWS"])
            with torch.cuda.device_of(query):
                kernels().forward_kernel[grid](
                    *inputs, out, lse, *_strides(*inputs, out), T, H, *band.arguments, math.log2(math.e) / D**0.5,
                    **settings)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.band = band
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        *inputs, out, lse = ctx.saved_tensors
        query, key = inputs[:2]
        grad, band = _rows(grad), ctx.band
        B, T, H, D = query.shape
        if not out.numel():
            return *(torch.zeros_like(tensor) for tensor in inputs[:5]), None, None
        scales = math.log2(math.e) / D**0.5, D**-0.5
        dots, d_query = torch.empty_like(lse), torch.empty_like(out)
        settings = _constants("query", query, key, band.slots)
        with torch.cuda.device_of(query):
            kernels().query_gradient_kernel[B * H, -(-T // settings["ROWS"])](
                *inputs, out, grad, lse, dots, d_query, *_strides(*inputs, out, grad, d_query), T, H,
                *band.arguments, *scales, **settings)
            d_keys = _key_gradients(inputs, grad, lse, dots, band, scales)
        return d_query, *d_keys, None, None


def _key_gradients(inputs: list[Tensor], grad: Tensor, lse: Tensor, dots: Tensor, band: _Band,
                   scales: tuple[float, float]) -> list[Tensor]:
    """Gradients of the trunk's keys and values and of the memory's."""
    query, key, _, memory_key = inputs[:4]
    (B, T, H, D), G, U = query.shape, key.shape[2], memory_key.shape[1]
    settings = _constants("key", query, key, band.slots)
    blocks = -(-T // settings["KEYS"]) + -(-U // settings["SLOTS"])
    each = 1 if B * G * blocks < FEW_PROGRAMS else H // G
    # those of keys and values, with the memory's rows after the trunk's, lie together so that they are summed together
    both = query.new_empty(2, B, T + U, H // each, D)
    results = both[0, :, :T], both[1, :, :T], both[0, :, T:], both[1, :, T:]
    kernels().key_gradient_kernel[B * H // each, blocks](
        *inputs, grad, lse, dots, *results, *_strides(*inputs, grad, *results), T, H, *band.arguments, *scales,
        EACH=each, **settings)
    if each != H // G:
        both = both.view(2, B, T + U, G, H // G, D).sum(4)
    return [both[0, :, :T], both[1, :, :T], both[0, :, T:], both[1, :, T:]]


def memory_attention(
    query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, memory_key_BCMGD: Tensor, memory_value_BCMGD: Tensor,
    memory_valid_BCM: Tensor, *, prefix_length: int, chunk_length: int, window: int,
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.memory_attention`; nothing but the output is written.

    Positions after the last chunk read what that chunk reads.
    """
    B, C, M, G = memory_key_BCMGD.shape[:4]
    _check(query_BTHD, key_BTGD, value_BTGD, memory_key_BCMGD, memory_value_BCMGD)
    valid_BCMG = memory_valid_BCM[..., None] if memory_valid_BCM.dim() == 3 else memory_valid_BCM
    valid_BUG = valid_BCMG.flatten(1, 2).expand(B, C * M, G).view(torch.uint8)
    band = _Band(prefix_length, chunk_length, C, window, M if C else 0)
    return _JointSoftmax.apply(
        query_BTHD, key_BTGD, value_BTGD, memory_key_BCMGD.flatten(1, 2), memory_value_BCMGD.flatten(1, 2), valid_BUG,
        band)


def causal_attention(query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.causal_attention`."""
    none_BCMGD = key_BTGD.new_empty(len(key_BTGD), 0, 0, *key_BTGD.shape[2:])
    none_BCM = torch.empty(len(key_BTGD), 0, 0, dtype=torch.bool, device=key_BTGD.device)
    return memory_attention(query_BTHD, key_BTGD, value_BTGD, none_BCMGD, none_BCMGD, none_BCM,
                            prefix_length=0, chunk_length=1, window=1)


def reference_attention(
    query_NTHD: Tensor, key_NTGD: Tensor, value_NTGD: Tensor, prefix_key_NPGD: Tensor, prefix_value_NPGD: Tensor
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.reference_attention`.

    The prefix is the memory of a single chunk that holds all tokens: nothing is copied, and no prefix row is computed.
    """
    valid_N1P = torch.ones(1, 1, 1, dtype=torch.bool, device=key_NTGD.device).expand(
        len(key_NTGD), 1, prefix_key_NPGD.shape[1])
    return memory_attention(query_NTHD, key_NTGD, value_NTGD, prefix_key_NPGD[:, None], prefix_value_NPGD[:, None],
                            valid_N1P, prefix_length=0, chunk_length=max(key_NTGD.shape[1], 1), window=1)
