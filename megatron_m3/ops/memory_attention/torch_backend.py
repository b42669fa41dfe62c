"""Attention with explicit memory from torch's own attention kernels: no dense mask, no loop over chunks.

The trunk is plain causal attention by the library's fused kernel; ``joint_softmax.py`` merges it with the memories.
Letters as in ``reference.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention.joint_softmax import Trunk, attend_jointly, merge_at_once

aten = torch.ops.aten


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


def _merge_by_chunk(
    trunk: Trunk, query: Tensor, memory_key: Tensor, memory_value: Tensor, valid: Tensor, prefix: int, length: int
) -> None:
    """A :data:`~megatron_m3.ops.memory_attention.joint_softmax.Merge` by the CPU's fused attention, chunk by chunk.

    Nothing is copied or padded; that a chunk takes some operations costs little where none waits for a device.
    """
    if not valid.any():
        return
    ends = range(prefix + length, query.shape[1] + length, length)
    masks = [None] * len(ends) if valid.all() else _masks(valid, query)
    for chunk, (end, mask) in enumerate(zip(ends, masks, strict=False)):
        rows = slice(end - length, end)
        read, read_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, rows].transpose(1, 2), memory_key[:, chunk], memory_value[:, chunk], 0.0, False, attn_mask=mask)
        if mask is not None:  # the library gives 0 where all slots are empty
            read_lse = read_lse.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
        lse = trunk.lse_BHT[:, :, rows]
        share = torch.sigmoid(read_lse - lse).to(query.dtype)
        trunk.out_BTHD[:, rows].lerp_(read.transpose(1, 2), share.transpose(1, 2)[..., None])
        lse.copy_(torch.logaddexp(lse, read_lse))


def _masks(valid_BCGU: Tensor, query_BTHD: Tensor) -> Sequence[Tensor]:
    """What to add to the scores of each chunk's memories, ``[B, H or 1, 1, U]``."""
    heads = valid_BCGU.shape[2]
    valid_CBHU = valid_BCGU.transpose(0, 1).repeat_interleave(query_BTHD.shape[2] // heads if heads > 1 else 1, 2)
    shown_CBHU = torch.zeros(valid_CBHU.shape, dtype=query_BTHD.dtype)
    return shown_CBHU.masked_fill_(~valid_CBHU, -torch.inf)[:, :, :, None].unbind()


def memory_attention(
    query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, memory_key_BCMGD: Tensor, memory_value_BCMGD: Tensor,
    memory_valid_BCM: Tensor, *, prefix_length: int, chunk_length: int, window: int,
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.memory_attention`; memory grows linearly with length."""
    merge = _merge_by_chunk if query_BTHD.device.type == "cpu" else merge_at_once
    return attend_jointly(
        TorchKernel(), query_BTHD, key_BTGD, value_BTGD, memory_key_BCMGD, memory_value_BCMGD, memory_valid_BCM,
        prefix_length=prefix_length, chunk_length=chunk_length, window=window, merge=merge)


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
