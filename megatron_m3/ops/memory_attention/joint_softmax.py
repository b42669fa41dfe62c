"""One softmax over the trunk and each chunk's memories, made of a library's attention over the trunk alone.

A :class:`TrunkKernel` computes causal attention and its log-sum-exp; the memories, a few dozen keys for each chunk, are
one small batched product; both are merged through their log-sum-exp. The backward pass hands the *merged* output and
log-sum-exp to the kernel's backward pass, which takes a key's weight as ``exp(score - lse)`` and a row's share as
``sum(grad * out)``: its gradients are then those of the one joint softmax, so no gradient has to flow through the
log-sum-exp, which library kernels do not give.

Letters as in ``reference.py``; ``L`` is the chunk length, ``W`` the window, ``U`` the slots that a chunk reads, ``R``
the query heads of a key-value head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_m3.ops.memory_attention.reference import empty_is_zero


class Trunk(NamedTuple):
    """What a kernel gives for the trunk; both tensors are its caller's to change."""

    out_BTHD: Tensor
    """Attention output."""
    lse_BHT: Tensor
    """Natural logarithm of the sum of ``exp(score)`` over the keys, in fp32 or wider."""
    rest: tuple[Any, ...] = ()
    """What the kernel's backward pass needs beside them."""


class TrunkKernel(Protocol):
    """Causal attention of the trunk by a library, key-value heads shared by ``H / G`` query heads each."""

    def forward(self, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Trunk:
        """Attention of each position to the trunk up to it, scores divided by ``sqrt(D)``."""

    def backward(
        self, grad_BTHD: Tensor, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, trunk: Trunk
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value as part of a softmax whose output and log-sum-exp ``trunk`` has."""


Joint = Callable[[Any, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Trunk]
"""Gives output and log-sum-exp of the joint softmax; it takes a :class:`TrunkKernel`, then tensors and lengths as
:class:`_JointSoftmax` has them."""


class _JointSoftmax(torch.autograd.Function):
    """One softmax over causal trunk keys and each chunk's memory keys.

    Trunk tensors are ``[B, T, H or G, D]``, memories ``[B, C, G, U, D]`` for chunks of ``L`` positions, their validity
    ``[B, C, G or 1, U]``.
    """

    @staticmethod
    def forward(ctx: Any, kernel: TrunkKernel, joint: Joint, query: Tensor, key: Tensor, value: Tensor,
                memory_key: Tensor, memory_value: Tensor, valid: Tensor, prefix: int, length: int) -> Tensor:
        out, lse, rest = joint(kernel, query, key, value, memory_key, memory_value, valid, prefix, length)
        ctx.save_for_backward(query, key, value, memory_key, memory_value, valid, out, lse)
        ctx.kernel, ctx.rest, ctx.prefix, ctx.length = kernel, rest, prefix, length
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        query, key, value, memory_key, memory_value, valid, out, lse = ctx.saved_tensors
        prefix, length = ctx.prefix, ctx.length
        d_query, d_key, d_value = ctx.kernel.backward(grad, query, key, value, Trunk(out, lse, ctx.rest))
        score = _memory_scores(query, memory_key, valid, prefix, length)
        weight = torch.exp(score - _lse_by_chunk(lse, memory_key, prefix, length))
        grad_chunks, out_chunks, query_chunks = (
            _by_chunk(rows[:, prefix:], memory_key, length) for rows in (grad, out, query))
        row = (_widen(grad_chunks) * _widen(out_chunks)).sum(-1, keepdim=True)
        d_weight = _dot(grad_chunks, memory_value)
        d_score = (weight * (d_weight - row) * query.shape[-1] ** -0.5).to(query.dtype)
        d_memory_value = torch.einsum("bcgrlu,bcgrld->bcgud", weight.to(query.dtype), grad_chunks)
        d_memory_key = torch.einsum("bcgrlu,bcgrld->bcgud", d_score, query_chunks)
        d_query_memory = torch.einsum("bcgrlu,bcgud->bcgrld", d_score, memory_key)
        d_query[:, prefix:] += _from_chunks(d_query_memory, query.shape[1] - prefix)
        return None, None, d_query, d_key, d_value, d_memory_key, d_memory_value, None, None, None


class _Causal(torch.autograd.Function):
    """A kernel's attention by itself."""

    @staticmethod
    def forward(ctx: Any, kernel: TrunkKernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse, rest = kernel.forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernel, ctx.rest = kernel, rest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        return None, *ctx.kernel.backward(grad, query, key, value, Trunk(out, lse, ctx.rest))


def merge_at_once(
    kernel: TrunkKernel, query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor,
    valid: Tensor, prefix: int, length: int,
) -> Trunk:
    """A :data:`Joint` of few operations, whatever the number of chunks."""
    trunk = kernel.forward(query, key, value)
    out, lse, _ = trunk
    score = _memory_scores(query, memory_key, valid, prefix, length)
    trunk_lse = _lse_by_chunk(lse, memory_key, prefix, length)
    joint_lse = torch.logaddexp(trunk_lse, score.logsumexp(-1, keepdim=True))
    weight = torch.exp(score - joint_lse).to(query.dtype)
    read = torch.einsum("bcgrlu,bcgud->bcgrld", weight, memory_value)
    scaled = _by_chunk(out[:, prefix:], memory_key, length) * torch.exp(trunk_lse - joint_lse)
    out[:, prefix:] = _from_chunks(read + scaled, query.shape[1] - prefix)
    lse[:, :, prefix:] = _from_chunks(joint_lse, query.shape[1] - prefix)[..., 0].transpose(1, 2)
    return trunk


def _memory_scores(query: Tensor, memory_key: Tensor, valid: Tensor, prefix: int, length: int) -> Tensor:
    """Scaled scores ``[B, C, G, R, L, U]`` in fp32 or wider, -inf where a slot is empty."""
    score = _dot(_by_chunk(query[:, prefix:], memory_key, length), memory_key) * query.shape[-1] ** -0.5
    return score.masked_fill(~valid[:, :, :, None, None, :], -torch.inf)


def _dot(rows_BCGRLD: Tensor, memory_BCGUD: Tensor) -> Tensor:
    """Products of rows and memory slots, ``[B, C, G, R, L, U]``; not rounded to 16 bits, which large scores lack."""
    return torch.einsum("bcgrld,bcgud->bcgrlu", _widen(rows_BCGRLD), _widen(memory_BCGUD))


def _widen(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_chunk(rows_BSHD: Tensor, memory_key: Tensor, length: int) -> Tensor:
    """Context rows ``[B, S, H, D]`` as ``[B, C, G, R, L, D]``, zero-padded to whole chunks."""
    (C, G), extra = memory_key.shape[1:3], memory_key.shape[1] * length - rows_BSHD.shape[1]
    padded = functional.pad(rows_BSHD, (0, 0, 0, 0, 0, extra)) if extra else rows_BSHD
    return padded.unflatten(1, (C, length)).unflatten(3, (G, -1)).permute(0, 1, 3, 4, 2, 5)


def _from_chunks(rows_BCGRLD: Tensor, num_context: int) -> Tensor:
    """The inverse of :func:`_by_chunk`."""
    return rows_BCGRLD.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :num_context]


def _lse_by_chunk(lse_BHT: Tensor, memory_key: Tensor, prefix: int, length: int) -> Tensor:
    """The context's log-sum-exp as ``[B, C, G, R, L, 1]``."""
    return _by_chunk(lse_BHT[:, :, prefix:, None].transpose(1, 2), memory_key, length)


def _slide(memory_BCMGD: Tensor, window: int) -> Tensor:
    """Each chunk's window of memories, its own and those of the chunks before: ``[B, C, G, W * M, D]``."""
    B, C, M, G, D = memory_BCMGD.shape
    if window == 1:
        return memory_BCMGD.transpose(2, 3)
    padded = functional.pad(memory_BCMGD, (0, 0, 0, 0, 0, 0, window - 1, 0))
    return padded.unfold(1, window, 1).permute(0, 1, 3, 5, 2, 4).reshape(B, C, G, window * M, D)


def _repeat_last(tensor_BC: Tensor, chunks: int) -> Tensor:
    """The last chunk's entry repeated until there are ``chunks``."""
    extra = chunks - tensor_BC.shape[1]
    return torch.cat([tensor_BC, tensor_BC[:, -1:].expand(-1, extra, *tensor_BC.shape[2:])], 1) if extra else tensor_BC


def attend_alone(kernel: TrunkKernel, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Tensor:
    """The kernel's attention, without memories, for kernels whose library does not make it differentiable itself."""
    return _Causal.apply(kernel, query_BTHD, key_BTGD, value_BTGD)


def attend_jointly(
    kernel: TrunkKernel, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, memory_key_BCMGD: Tensor,
    memory_value_BCMGD: Tensor, memory_valid_BCM: Tensor, *, prefix_length: int, chunk_length: int, window: int,
    joint: Joint = merge_at_once,
) -> Tensor:
    """:func:`~megatron_m3.ops.memory_attention.reference.memory_attention` with ``kernel`` for the trunk.

    Memory grows linearly with length. Positions after the last chunk read what that chunk reads.
    """
    num_context, C = query_BTHD.shape[1] - prefix_length, memory_valid_BCM.shape[1]
    length = max(num_context, 1) if C == 1 else chunk_length
    chunks, window = max(C, -(-num_context // length)), min(window, C)
    valid_BCMG = memory_valid_BCM[..., None] if memory_valid_BCM.dim() == 3 else memory_valid_BCM
    memory_key_BCMGD, memory_value_BCMGD = empty_is_zero(memory_key_BCMGD, memory_value_BCMGD, valid_BCMG)
    return _JointSoftmax.apply(
        kernel, joint, query_BTHD, key_BTGD, value_BTGD, _repeat_last(_slide(memory_key_BCMGD, window), chunks),
        _repeat_last(_slide(memory_value_BCMGD, window), chunks),
        _repeat_last(_slide(valid_BCMG[..., None], window)[..., 0], chunks), prefix_length, length,
    )
