"""Attention of one new token of every sequence to ``[prefix | memory slots | context]``, in plain torch.

Letters: B sequences, H query heads, G key-value heads, R query heads of a key-value head, D head size, T columns of the
cache, M memory slots.
"""

import torch
from torch import Tensor

from megatron_m3.ops.rope.reference import Table, rotate


def cached_attention(
    query_BHD: Tensor, key_BGD: Tensor, value_BGD: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor, table: Table,
    lengths_B: Tensor, *, prefix_length: int, mask_BM: Tensor | None = None, hidden_G: Tensor | None = None,
) -> Tensor:
    """Rotate the new token's query and key, store its key and value behind the context, and attend to all before it.

    Args:
        query_BHD: queries, not rotated, as ``key_BGD`` and ``value_BGD``.
        keys_BGTD: rotated keys of the cache, which gets the new one; ``values_BGTD`` its values.
        table: turns of the new tokens, ``[B or 1, 1, D]``.
        lengths_B: context tokens of each sequence in the cache, the new one not counted.
        prefix_length: columns that every token reads, before the memory slots.
        mask_BM: 0 where a slot holds a kept token, and -inf where it holds none; None: there are no slots.
        hidden_G: the heads that read no memory; None: all do.

    Returns:
        The attention's output ``[B, H, D]``, of a softmax over scores divided by ``sqrt(D)``.
    """
    slots = 0 if mask_BM is None else mask_BM.shape[1]
    rows_B, place_B = torch.arange(len(lengths_B), device=lengths_B.device), prefix_length + slots + lengths_B
    keys_BGTD[rows_B, :, place_B] = rotate(key_BGD, table)
    values_BGTD[rows_B, :, place_B] = value_BGD
    G, T, D = keys_BGTD.shape[1:]
    shown_BGT = (torch.arange(T, device=place_B.device) <= place_B[:, None])[:, None].repeat(1, G, 1)
    if mask_BM is not None:
        memory_BGM = shown_BGT[..., prefix_length : prefix_length + slots]
        memory_BGM &= (mask_BM == 0)[:, None]
        if hidden_G is not None:
            memory_BGM &= ~hidden_G[:, None]
    # what is not shown may be anything, also no number
    keys_BGTD, values_BGTD = (part.masked_fill(~shown_BGT[..., None], 0) for part in (keys_BGTD, values_BGTD))
    query_BGRD = rotate(query_BHD, table).unflatten(1, (G, -1))
    score_BGRT = (query_BGRD @ keys_BGTD.transpose(2, 3)) * D**-0.5
    weight_BGRT = score_BGRT.masked_fill(~shown_BGT[:, :, None], -torch.inf).softmax(-1)
    return (weight_BGRT @ values_BGTD).flatten(1, 2)
