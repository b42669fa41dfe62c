"""Rotary position embedding by a Triton kernel, forward and backward, on CUDA or under Triton's interpreter.

Plain torch writes five intermediates in fp32, tens of bytes for each number where reading and writing it takes four: on
a card that is a third of a layer's time.

Letters: S positions, B sequences, H heads, D head size.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.rope.reference import Table
from megatron_m3.ops.triton_support import load_kernels, need_device

WHO, INSTEAD = "model.attention=triton: RoPE", "use torch"
NUMBERS = 1024
"""Pairs of numbers that a program turns, about."""


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernel."""
    return load_kernels("megatron_m3.ops.rope.triton_kernels", WHO, INSTEAD)


def launch_options(heads: int, head_size: int) -> dict[str, Any]:
    """Arguments that are compiled into the kernel, and how it is launched.

    Products are rounded before they are added, as elsewhere: the result has the bits of plain torch.
    """
    half = 1 << (head_size // 2 - 1).bit_length()
    some = max(1, min(1 << (heads - 1).bit_length(), NUMBERS // half))
    return {"D": head_size, "HALF": half, "HEADS": some, "num_warps": 4, "enable_fp_fusion": False}


def rotate(vectors_SBHD: Tensor, table: Table) -> Tensor:
    """See :func:`megatron_m3.ops.rope.reference.rotate`; the table is ``[S or 1, B or 1, 1, D]`` in fp32.

    Raises:
        UnsupportedError: no Triton, no device that it runs on, or a dtype without a kernel.
    """
    kernels()
    need_device(vectors_SBHD, WHO, INSTEAD)
    if vectors_SBHD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedError(f"{WHO}: no kernel for {vectors_SBHD.dtype}; {INSTEAD}")
    shape = *vectors_SBHD.shape[:2], 1, vectors_SBHD.shape[3]
    cosine, sine = (part.expand(shape) for part in table)
    assert cosine.dtype == sine.dtype == torch.float32, "a table of another dtype"
    assert cosine.stride() == sine.stride(), "cosines and sines lie apart"
    assert cosine.stride(-1) == 1, "columns apart"
    assert shape[3] % 2 == 0, "an odd head size"
    return _Rotate.apply(vectors_SBHD, cosine, sine)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _launch(vectors, cosine, sine, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _launch(grad, *ctx.saved_tensors, is_backward=True), None, None


def _launch(vectors: Tensor, cosine: Tensor, sine: Tensor, *, is_backward: bool) -> Tensor:
    vectors = vectors if vectors.stride(-1) == 1 else vectors.contiguous()
    out = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    S, B, H, D = vectors.shape
    options = launch_options(H, D)
    with torch.cuda.device_of(vectors):
        kernels().rotate_kernel[S * B, -(-H // options["HEADS"])](
            vectors, cosine, sine, out, vectors.stride()[:3], cosine.stride()[:2], out.stride()[:3], B, H,
            BACKWARD=is_backward, **options)
    return out
