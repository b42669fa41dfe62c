"""Attention with explicit memory from torch's own attention kernels: no dense mask.

The trunk is plain causal attention by the library's fused kernel; ``joint_softmax.py`` merges it with the memories. On
the CPU, where a call costs little, each chunk attends to its memories and the trunk in one.
Letters as in ``reference.py``.
"""

import torch
from torch import Tensor
from torch.nn import functional

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention.joint_softmax import Trunk, attend_jointly, merge_at_once

aten = torch.ops.aten
ROWS = 64
"""Most rows of a chunk in one call on the CPU."""
COLUMNS = 16
"""Numbers of a CPU's vector; products are up to a fifth slower where columns do not fill them."""


class TorchKernel:
    """torch's fused attention: flash attention, or for fp32 on CUDA its memory-efficient attention."""

    def forward(self, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Trunk:
        """See :class:`~megatron_m3.ops.memory_attention.joint_softmax.TrunkKernel`."""
        query, key, value = (part.transpose(1, 2) for part in (query_BTHD, key_BTGD, value_BTGD))
        if query.device.type == "cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
            return Trunk(out.transpose(1, 2), lse)
        head_size = query.shape[-1]
        if head_size % 8 or head_size > 256:
            raise UnsupportedError(
                f"model.head_size={head_size}: the library's kernels on this device take multiples of 8 up to 256; "
                "set model.attention=reference"
            )
        if query.dtype in (torch.float16, torch.bfloat16):
            out, lse, *rest = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)
            return Trunk(out.transpose(1, 2), lse, tuple(rest[:6]))
        if query.dtype != torch.float32:
            raise UnsupportedError(f"model.attention=torch: no kernel for {query.dtype} on this device; use reference")
        repeat = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeat, 1) for part in (key, value))
        out, lse, *rest = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True)
        # this kernel pads its rows to a multiple of 32
        return Trunk(out.transpose(1, 2), lse[..., : query.shape[2]], (*rest, lse.shape[-1]))

    def backward(
        self, grad_BTHD: Tensor, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, trunk: Trunk
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~megatron_m3.ops.memory_attention.joint_softmax.TrunkKernel`."""
        grad, query, key, value, out = (
            part.transpose(1, 2) for part in (grad_BTHD, query_BTHD, key_BTGD, value_BTGD, trunk.out_BTHD))
        lse = trunk.lse_BHT
        if query.device.type == "cpu":
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, out, lse, 0.0, True)
        elif query.dtype in (torch.float16, torch.bfloat16):
            cumulative_q, cumulative_k, max_q, max_k, seed, offset = trunk.rest
            gradients = aten._scaled_dot_product_flash_attention_backward(
                grad, query, key, value, out, lse, cumulative_q, cumulative_k, max_q, max_k, 0.0, True, seed, offset)
        else:
            seed, offset, rows = trunk.rest
            heads, repeat = key.shape[1], query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(repeat, 1) for part in (key, value))
            padded = functional.pad(lse, (0, rows - lse.shape[-1]), value=torch.inf)
            d_query, *others, _ = aten._scaled_dot_product_efficient_attention_backward(
                grad, query, key, value, None, out, padded, seed, offset, 0.0, [True, True, True, False], True)
            gradients = d_query, *(part.unflatten(1, (heads, repeat)).sum(2) for part in others)
        d_query, d_key, d_value = (part.transpose(1, 2) for part in gradients[:3])
        return d_query, d_key, d_value


def _by_chunk(
    kernel: TorchKernel, query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor,
    valid: Tensor, prefix: int, length: int,
) -> Trunk:
    """A :data:`~megatron_m3.ops.memory_attention.joint_softmax.Joint` by the CPU's fused attention, a few rows at once.

    Before the trunk is room for memories, where each chunk's are put in turn; so nothing is merged.
    """
    (B, T, H), U = query.shape[:3], memory_key.shape[3]
    first = U + -(U + prefix) % COLUMNS
    rooms = [_room(part, first) for part in (key, value)]
    shown = query.new_full((*valid.shape[:2], H if valid.shape[2] > 1 else 1, 1, first), -torch.inf)
    shown[..., first - U :].masked_fill_(valid.repeat_interleave(shown.shape[2] // valid.shape[2], 2)[..., None, :], 0)
    triangle = query.new_full((ROWS + prefix, ROWS + prefix), -torch.inf).triu(1)
    out = torch.empty_like(query)
    lse = query.new_empty(B, H, T, dtype=torch.promote_types(query.dtype, torch.float32))
    for chunk, begin in enumerate(range(prefix, max(T, prefix + 1), length)):
        for room, memory in zip(rooms, (memory_key, memory_value), strict=True):
            room[:, :, first - U : first] = memory[:, chunk]
        end = min(begin + length, T)
        for start in range(begin, max(end, begin + 1), ROWS):
            rows = slice(start if start > prefix else 0, min(start + ROWS, end))
            count, columns = rows.stop - rows.start, first + rows.stop
            mask = query.new_zeros(B, shown.shape[2], count, columns)
            mask[..., :first] = shown[:, chunk]
            mask[..., : max(prefix - rows.start, 0), :first] = -torch.inf
            mask[..., first + rows.start :] = triangle[:count, :count]
            read, lse[:, :, rows] = aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, rows].transpose(1, 2), *(room[:, :, :columns] for room in rooms), 0.0, False, attn_mask=mask)
            out[:, rows] = read.transpose(1, 2)
    return Trunk(out, lse)


def _room(trunk_BTGD: Tensor, first: int) -> Tensor:
    """The trunk's keys or values by head, ``[B, G, first + T, D]``, behind columns of zeros."""
    B, T, G, D = trunk_BTGD.shape
    room = trunk_BTGD.new_empty(B, G, first + T, D)
    room[:, :, :first] = 0
    room[:, :, first:] = trunk_BTGD.transpose(1, 2)
    return room


def memory_attention(
    query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, memory_key_BCMGD: Tensor, memory_value_BCMGD: Tensor,
    memory_valid_BCM: Tensor, *, prefix_length: int, chunk_length: int, window: int,
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.memory_attention`; memory grows linearly with length."""
    joint = _by_chunk if query_BTHD.device.type == "cpu" else merge_at_once
    return attend_jointly(
        TorchKernel(), query_BTHD, key_BTGD, value_BTGD, memory_key_BCMGD, memory_value_BCMGD, memory_valid_BCM,
        prefix_length=prefix_length, chunk_length=chunk_length, window=window, joint=joint)


def causal_attention(query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.causal_attention`."""
    heads = query_BTHD.shape[2]
    return functional.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2), _heads_first(key_BTGD, heads), _heads_first(value_BTGD, heads), is_causal=True
    ).transpose(1, 2)


def _heads_first(tensor_BTGD: Tensor, heads: int) -> Tensor:
    """``[B, T, G, D]`` as ``[B, heads, T, D]``, each key-value head repeated for its query heads."""
    repeat = heads // tensor_BTGD.shape[2]
    return (tensor_BTGD.repeat_interleave(repeat, 2) if repeat > 1 else tensor_BTGD).transpose(1, 2)


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
