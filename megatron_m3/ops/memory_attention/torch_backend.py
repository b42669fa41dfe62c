"""Attention with explicit memory from torch's own attention kernels: no dense mask, no loop over chunks.

The trunk is plain causal attention by the library's fused kernel, which also returns its log-sum-exp; the memories,
a few dozen keys for each chunk, are one small batched product; both are merged through their log-sum-exp. The backward
pass hands the *merged* output and log-sum-exp to the library's backward kernel: its gradients are then those of the one
joint softmax, so no gradient has to flow through the log-sum-exp, which library kernels do not give.

Letters as in ``reference.py``; ``L`` is the chunk length, ``W`` the window, ``R`` the query heads of a key-value head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention.reference import empty_is_zero

aten = torch.ops.aten


def _fused_forward(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Causal attention by the library: output, log-sum-exp ``[B, H, T]`` in fp32, and what its backward needs."""
    if query_BHTD.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query_BHTD, key_BHTD, value_BHTD, 0.0, True)
        return out, lse, ()
    head_size = query_BHTD.shape[-1]
    if head_size % 8 or head_size > 256:
        raise UnsupportedError(
            f"model.head_size={head_size}: the library's kernels on this device take multiples of 8 up to 256; "
            "set model.attention=reference"
        )
    if query_BHTD.dtype in (torch.float16, torch.bfloat16):
        out, lse, *rest = aten._scaled_dot_product_flash_attention(query_BHTD, key_BHTD, value_BHTD, 0.0, True)
        return out, lse, tuple(rest[:6])
    if query_BHTD.dtype == torch.float32:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query_BHTD, key_BHTD, value_BHTD, None, True, 0.0, True
        )
        # this kernel pads its rows to a multiple of 32
        return out, lse[..., : query_BHTD.shape[2]], (seed, offset, lse.shape[-1])
    raise UnsupportedError(f"model.attention=torch: no kernel for {query_BHTD.dtype} on this device; use reference")


def _fused_backward(
    grad_BHTD: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the library's causal attention as part of a joint softmax with output ``out`` and sum ``lse``."""
    if query.device.type == "cpu":
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHTD, query, key, value, out, lse, 0.0, True
        )
    elif query.dtype in (torch.float16, torch.bfloat16):
        cumulative_q, cumulative_k, max_q, max_k, seed, offset = rest
        gradients = aten._scaled_dot_product_flash_attention_backward(
            grad_BHTD, query, key, value, out, lse, cumulative_q, cumulative_k, max_q, max_k, 0.0, True, seed, offset
        )
    else:
        seed, offset, rows = rest
        padded = functional.pad(lse, (0, rows - lse.shape[-1]), value=torch.inf)
        gradients = aten._scaled_dot_product_efficient_attention_backward(
            grad_BHTD, query, key, value, None, out, padded, seed, offset, 0.0, [True, True, True, False], True
        )
    return gradients[0], gradients[1], gradients[2]


class _JointSoftmax(torch.autograd.Function):
    """One softmax over causal trunk keys and each chunk's memory keys.

    Trunk tensors are ``[B, H, T, D]`` (heads repeated), memories ``[B, C, G, U, D]`` for chunks of ``L`` positions,
    their validity ``[B, C, G or 1, U]``.
    """

    @staticmethod
    def _memory_scores(query_BHTD: Tensor, memory_key: Tensor, valid: Tensor, prefix: int, length: int) -> Tensor:
        """Scaled scores ``[B, C, G, R, L, U]`` in fp32 or wider, -inf where a slot is empty."""
        query_BCGRLD = _by_chunk(query_BHTD[:, :, prefix:], memory_key, length)
        score = _widen(torch.einsum("bcgrld,bcgud->bcgrlu", query_BCGRLD, memory_key)) * query_BHTD.shape[-1] ** -0.5
        return score.masked_fill(~valid[:, :, :, None, None, :], -torch.inf)

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor,
                valid: Tensor, prefix: int, length: int) -> Tensor:
        out, lse, rest = _fused_forward(query, key, value)
        num_context = query.shape[2] - prefix
        score = _JointSoftmax._memory_scores(query, memory_key, valid, prefix, length)
        trunk_lse = _by_chunk(lse[:, :, prefix:, None], memory_key, length)[..., 0]
        joint_lse = torch.logaddexp(trunk_lse, score.logsumexp(-1))
        weight = torch.exp(score - joint_lse[..., None]).to(query.dtype)
        read = torch.einsum("bcgrlu,bcgud->bcgrld", weight, memory_value)
        scaled = _by_chunk(out[:, :, prefix:], memory_key, length) * torch.exp(trunk_lse - joint_lse)[..., None]
        context = _from_chunks((read + scaled).to(query.dtype), num_context)
        out = torch.cat([out[:, :, :prefix], context], 2)
        lse = torch.cat([lse[:, :, :prefix], _from_chunks(joint_lse[..., None], num_context)[..., 0]], 2)
        ctx.save_for_backward(query, key, value, memory_key, memory_value, valid, out, lse)
        ctx.rest, ctx.prefix, ctx.length = rest, prefix, length
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        query, key, value, memory_key, memory_value, valid, out, lse = ctx.saved_tensors
        prefix, length, num_context = ctx.prefix, ctx.length, query.shape[2] - ctx.prefix
        d_query, d_key, d_value = _fused_backward(grad, query, key, value, out, lse, ctx.rest)
        score = _JointSoftmax._memory_scores(query, memory_key, valid, prefix, length)
        joint_lse = _by_chunk(lse[:, :, prefix:, None], memory_key, length)
        weight = torch.exp(score - joint_lse)
        grad_chunks = _by_chunk(grad[:, :, prefix:], memory_key, length)
        out_chunks = _by_chunk(out[:, :, prefix:], memory_key, length)
        query_chunks = _by_chunk(query[:, :, prefix:], memory_key, length)
        row = (_widen(grad_chunks) * _widen(out_chunks)).sum(-1, keepdim=True)
        d_weight = _widen(torch.einsum("bcgrld,bcgud->bcgrlu", grad_chunks, memory_value))
        d_score = (weight * (d_weight - row) * query.shape[-1] ** -0.5).to(query.dtype)
        weight = weight.to(query.dtype)
        d_memory_value = torch.einsum("bcgrlu,bcgrld->bcgud", weight, grad_chunks)
        d_memory_key = torch.einsum("bcgrlu,bcgrld->bcgud", d_score, query_chunks)
        d_query_memory = torch.einsum("bcgrlu,bcgud->bcgrld", d_score, memory_key)
        d_query = d_query + functional.pad(_from_chunks(d_query_memory, num_context), (0, 0, prefix, 0))
        return d_query, d_key, d_value, d_memory_key, d_memory_value, None, None, None


def _widen(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_chunk(rows_BHSD: Tensor, memory_key: Tensor, length: int) -> Tensor:
    """Context rows ``[B, H, S, D]`` as ``[B, C, G, R, L, D]``, zero-padded to whole chunks."""
    B, H, S, D = rows_BHSD.shape
    C, G = memory_key.shape[1:3]
    padded = functional.pad(rows_BHSD, (0, 0, 0, C * length - S)) if C * length != S else rows_BHSD
    return padded.reshape(B, G, H // G, C, length, D).permute(0, 3, 1, 2, 4, 5)


def _from_chunks(rows_BCGRLD: Tensor, num_context: int) -> Tensor:
    """The inverse of :func:`_by_chunk`."""
    B, C, G, R, L, D = rows_BCGRLD.shape
    return rows_BCGRLD.permute(0, 2, 3, 1, 4, 5).reshape(B, G * R, C * L, D)[:, :, :num_context]


def _slide(memory_BCMGD: Tensor, window: int) -> Tensor:
    """Each chunk's window of memories, its own and those of the chunks before: ``[B, C, G, W * M, D]``."""
    B, C, M, G, D = memory_BCMGD.shape
    padded = functional.pad(memory_BCMGD, (0, 0, 0, 0, 0, 0, window - 1, 0))
    return padded.unfold(1, window, 1).permute(0, 1, 3, 5, 2, 4).reshape(B, C, G, window * M, D)


def _repeat_last(tensor_BC: Tensor, chunks: int) -> Tensor:
    """The last chunk's entry repeated until there are ``chunks``."""
    extra = chunks - tensor_BC.shape[1]
    return torch.cat([tensor_BC, tensor_BC[:, -1:].expand(-1, extra, *tensor_BC.shape[2:])], 1) if extra else tensor_BC


def _heads_first(tensor_BTGD: Tensor, heads: int) -> Tensor:
    """``[B, T, G, D]`` as ``[B, heads, T, D]``, each key-value head repeated for its query heads."""
    repeat = heads // tensor_BTGD.shape[2]
    return (tensor_BTGD.repeat_interleave(repeat, 2) if repeat > 1 else tensor_BTGD).transpose(1, 2)


def memory_attention(
    query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, memory_key_BCMGD: Tensor, memory_value_BCMGD: Tensor,
    memory_valid_BCM: Tensor, *, prefix_length: int, chunk_length: int, window: int,
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.memory_attention`; memory grows linearly with length.

    Positions after the last chunk read what that chunk reads.
    """
    heads, num_context = query_BTHD.shape[2], query_BTHD.shape[1] - prefix_length
    C = memory_valid_BCM.shape[1]
    length = max(num_context, 1) if C == 1 else chunk_length
    chunks = max(C, -(-num_context // length))
    window = min(window, C)
    valid_BCMG = memory_valid_BCM[..., None] if memory_valid_BCM.dim() == 3 else memory_valid_BCM
    valid = _slide(valid_BCMG[..., None], window)[..., 0]
    memory_key_BCMGD, memory_value_BCMGD = empty_is_zero(memory_key_BCMGD, memory_value_BCMGD, valid_BCMG)
    out_BHTD = _JointSoftmax.apply(
        query_BTHD.transpose(1, 2), _heads_first(key_BTGD, heads), _heads_first(value_BTGD, heads),
        _repeat_last(_slide(memory_key_BCMGD, window), chunks),
        _repeat_last(_slide(memory_value_BCMGD, window), chunks),
        _repeat_last(valid, chunks), prefix_length, length,
    )
    return out_BHTD.transpose(1, 2)


def causal_attention(query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.causal_attention`."""
    heads = query_BTHD.shape[2]
    return functional.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2), _heads_first(key_BTGD, heads), _heads_first(value_BTGD, heads), is_causal=True
    ).transpose(1, 2)


def reference_attention(
    query_NTHD: Tensor, key_NTGD: Tensor, value_NTGD: Tensor, prefix_key_NPGD: Tensor, prefix_value_NPGD: Tensor
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.reference_attention`.

    The prefix rows get queries of zeros whose output is dropped, so that the library's square causal kernel serves.
    """
    prefix = prefix_key_NPGD.shape[1]
    out = causal_attention(
        functional.pad(query_NTHD, (0, 0, 0, 0, prefix, 0)),
        torch.cat([prefix_key_NPGD, key_NTGD], 1),
        torch.cat([prefix_value_NPGD, value_NTGD], 1),
    )
    return out[:, prefix:]
