"""Attention with explicit memory in plain torch: the truth that every faster version is tested against (eq. 4).

Letters: B batch, T trunk = prefix then context, S context, H query heads, G key-value heads, D head size, C chunks,
M memory slots of a chunk, N references, P prefix. Queries and keys arrive with RoPE applied.
"""

import torch
from torch import Tensor


def _attend(query_BTHD: Tensor, key_BUGD: Tensor, value_BUGD: Tensor, visible_BGTU: Tensor) -> Tensor:
    """Softmax attention in fp32 (fp64 for fp64 inputs) under a boolean mask, whose G may be 1.

    Every query sees at least one key.
    """
    repeat = query_BTHD.shape[2] // key_BUGD.shape[2]
    wide = torch.promote_types(query_BTHD.dtype, torch.float32)
    key_BUHD = key_BUGD.to(wide).repeat_interleave(repeat, 2)
    value_BUHD = value_BUGD.to(wide).repeat_interleave(repeat, 2)
    visible_BHTU = visible_BGTU.repeat_interleave(repeat if visible_BGTU.shape[1] > 1 else 1, 1)
    score_BHTU = torch.einsum("bthd,buhd->bhtu", query_BTHD.to(wide), key_BUHD) / query_BTHD.shape[-1] ** 0.5
    weight_BHTU = score_BHTU.masked_fill(~visible_BHTU, -torch.inf).softmax(-1)
    return torch.einsum("bhtu,buhd->bthd", weight_BHTU, value_BUHD).to(query_BTHD.dtype)


def visible_memories(num_context: int, num_chunks: int, chunk_length: int, window: int, num_slots: int) -> Tensor:
    """Which memory slots each context position may read, validity aside: bool ``[S, C * M]``.

    Position i (the BOS is 0) belongs to chunk ``min(i // chunk_length, C - 1)`` and reads the memories of that chunk
    and of the ``window - 1`` chunks before it.
    """
    chunk_S = (torch.arange(num_context) // chunk_length).clamp(max=num_chunks - 1)
    owner_CM = torch.arange(num_chunks).repeat_interleave(num_slots)
    return (owner_CM <= chunk_S[:, None]) & (owner_CM > chunk_S[:, None] - window)


def empty_is_zero(memory_key_BCMGD: Tensor, memory_value_BCMGD: Tensor, valid_BCMG: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with 0 where a slot holds nothing: a weight of 0 would not keep out a NaN that stands there."""
    empty_BCMG1 = ~valid_BCMG[..., None]
    return memory_key_BCMGD.masked_fill(empty_BCMG1, 0), memory_value_BCMGD.masked_fill(empty_BCMG1, 0)


def memory_attention(
    query_BTHD: Tensor,
    key_BTGD: Tensor,
    value_BTGD: Tensor,
    memory_key_BCMGD: Tensor,
    memory_value_BCMGD: Tensor,
    memory_valid_BCM: Tensor,
    *,
    prefix_length: int,
    chunk_length: int,
    window: int,
) -> Tensor:
    """One softmax over prefix, the memories of the position's chunks, and the context up to the position (eq. 4).

    Args:
        query_BTHD: queries of the trunk, ``T = prefix_length + S``.
        key_BTGD: its keys.
        value_BTGD: its values.
        memory_key_BCMGD: kept keys, in chunk order.
        memory_value_BCMGD: kept values.
        memory_valid_BCM: False where a slot holds nothing; it is never read. Also ``[B, C, M, G]``, where key-value
            heads differ.
        prefix_length: rows of the trunk that are prefix and read no memory.
        chunk_length: context positions in a chunk.
        window: chunks whose memories a position reads: its own and those before it.

    Returns:
        ``[B, T, H, D]``.
    """
    (B, T), (C, M) = query_BTHD.shape[:2], memory_valid_BCM.shape[1:3]
    device = query_BTHD.device
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    reads_TU = torch.zeros(T, C * M, dtype=torch.bool, device=device)
    reads_TU[prefix_length:] = visible_memories(T - prefix_length, C, chunk_length, window, M).to(device)
    valid_BCMG = memory_valid_BCM[..., None] if memory_valid_BCM.dim() == 3 else memory_valid_BCM
    valid_BGU = valid_BCMG.flatten(1, 2).transpose(1, 2)
    visible_BGTU = reads_TU & valid_BGU[:, :, None]
    trunk_BGTT = causal_TT.expand(B, visible_BGTU.shape[1], T, T)
    memory_key_BCMGD, memory_value_BCMGD = empty_is_zero(memory_key_BCMGD, memory_value_BCMGD, valid_BCMG)
    key_BUGD = torch.cat([memory_key_BCMGD.flatten(1, 2), key_BTGD], 1)
    value_BUGD = torch.cat([memory_value_BCMGD.flatten(1, 2), value_BTGD], 1)
    return _attend(query_BTHD, key_BUGD, value_BUGD, torch.cat([visible_BGTU, trunk_BGTT], 3))


def causal_attention(query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Tensor:
    """Plain causal attention over the trunk: every position reads what stands up to it."""
    B, T = query_BTHD.shape[:2]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=query_BTHD.device).tril()
    return _attend(query_BTHD, key_BTGD, value_BTGD, causal_TT.expand(B, 1, T, T))


def reference_attention(
    query_NTHD: Tensor, key_NTGD: Tensor, value_NTGD: Tensor, prefix_key_NPGD: Tensor, prefix_value_NPGD: Tensor
) -> Tensor:
    """Attention inside references: each token reads the prefix and its own reference up to itself (section 3.2).

    Returns:
        ``[N, T, H, D]``.
    """
    N, T = query_NTHD.shape[:2]
    P = prefix_key_NPGD.shape[1]
    visible_TU = torch.ones(T, P + T, dtype=torch.bool, device=query_NTHD.device).tril(P)
    return _attend(
        query_NTHD,
        torch.cat([prefix_key_NPGD, key_NTGD], 1),
        torch.cat([prefix_value_NPGD, value_NTGD], 1),
        visible_TU.expand(N, 1, T, P + T),
    )
