"""How much attention the tokens of a reference receive: the rule of section 3.2, written from the equation.

Letters: N references, T tokens of a reference, H query heads, G key-value heads, D head size.
"""

import itertools
from typing import Literal

import torch
from torch import Tensor

type Rule = Literal["softmax", "exp", "value"]
SCORES_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Scores of queries and keys held at a time, by device: what stays in a core's cache, or is little of a GPU's."""


def token_weights(
    query_NTHD: Tensor, key_NTGD: Tensor, lengths_N: Tensor, rule: Rule = "softmax", value_NTGD: Tensor | None = None
) -> Tensor:
    """Attention that each token receives, summed over queries and over the query heads of its key-value head.

    ``w_j = sum_i softmax_j(q_i . k_j / sqrt(D))`` over the reference's own tokens: no causal mask, no RoPE. With rule
    "exp" the softmax's normalisation is left out; the result is then its logarithm, which has the same order. With rule
    "value" a weight is multiplied by the length of the token's value, so that it says how much the token adds.

    Args:
        query_NTHD: queries before RoPE.
        key_NTGD: keys before RoPE.
        lengths_N: tokens of each reference; later ones are padding and take no part.
        rule: softmax (section 3.3), exp (the paper's code) or value.
        value_NTGD: values, for rule value.

    Returns:
        Weights ``[N, G, T]`` in fp32, -inf at padding.
    """
    T, H = query_NTHD.shape[1:3]
    some = max(1, SCORES_AT_ONCE[query_NTHD.device.type] // (H * T * T or 1))
    values = itertools.repeat(None) if value_NTGD is None else value_NTGD.split(some)
    parts = zip(query_NTHD.split(some), key_NTGD.split(some), lengths_N.split(some), values, strict=False)
    return torch.cat([_weights(query, key, lengths, rule, value) for query, key, lengths, value in parts])


def _weights(
    query_NTHD: Tensor, key_NTGD: Tensor, lengths_N: Tensor, rule: Rule, value_NTGD: Tensor | None
) -> Tensor:
    """The weights of few references, all scores at once."""
    N, T, H, D = query_NTHD.shape
    G = key_NTGD.shape[2]
    wide = torch.promote_types(query_NTHD.dtype, torch.float32)
    query_NTGRD = query_NTHD.to(wide).reshape(N, T, G, H // G, D)
    score_NGRTT = torch.einsum("nigrd,njgd->ngrij", query_NTGRD, key_NTGD.to(wide)).div_(D**0.5)
    valid_NT = torch.arange(T, device=lengths_N.device) < lengths_N[:, None]
    score_NGRTT.masked_fill_(~valid_NT[:, None, None, None, :], -torch.inf)
    if rule == "exp":
        score_NGRTT = score_NGRTT.masked_fill(~valid_NT[:, None, None, :, None], -torch.inf)
        return score_NGRTT.logsumexp((2, 3))
    attention_NGRTT = score_NGRTT.softmax(-1).mul_(valid_NT[:, None, None, :, None])
    weight_NGT = attention_NGRTT.sum((2, 3))
    if rule == "value":
        assert value_NTGD is not None, "rule value needs the values"
        weight_NGT = weight_NGT * value_NTGD.to(wide).norm(dim=-1).transpose(1, 2)
    # a missing reference has no valid key at all: its softmax is NaN and its weights are -inf
    return weight_NGT.masked_fill(~valid_NT[:, None, :], -torch.inf)
