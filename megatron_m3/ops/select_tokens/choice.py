"""Which tokens of a reference an explicit memory keeps (section 3.2).

Letters: N references, T tokens of a reference, H query heads, G key-value heads, D head size, K kept tokens.
"""

import torch
from torch import Tensor

from megatron_m3.ops.choice import takes_triton
from megatron_m3.ops.select_tokens import triton_backend
from megatron_m3.ops.select_tokens.reference import Rule, token_weights


@torch.no_grad()
def select_tokens(
    query_NTHD: Tensor,
    key_NTGD: Tensor,
    lengths_N: Tensor,
    num_kept: int,
    rule: Rule = "softmax",
    preferred_GT: Tensor | None = None,
    value_NTGD: Tensor | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """The ``num_kept`` tokens with the largest weight for each key-value head, in their order of position.

    Equal weights are decided for the earlier token. A reference shorter than ``num_kept`` keeps what it has. With
    ``preferred_GT`` (bool) a head takes tokens that it does not prefer only when there are no others.
    Triton, which writes no scores, weighs them where it goes with attention ``backend``.

    Returns:
        indices ``[N, G, K]``, ascending, 0 where nothing is kept; valid ``[N, K]``, False where nothing is kept.
    """
    T = query_NTHD.shape[1]
    weigh = triton_backend.token_weights if takes_triton(backend, query_NTHD.shape[-1]) else token_weights
    weight_NGT = weigh(query_NTHD, key_NTGD, lengths_N, rule, value_NTGD)
    order_NGT = weight_NGT.argsort(dim=-1, descending=True, stable=True)
    if preferred_GT is not None:
        # padding, whose weight is -inf, stays behind all tokens
        later_NGT = (~preferred_GT).int() + weight_NGT.isneginf()
        order_NGT = order_NGT.gather(-1, later_NGT.gather(-1, order_NGT).argsort(dim=-1, stable=True))
    order_NGK = order_NGT[..., :num_kept]
    valid_NK = torch.arange(order_NGK.shape[-1], device=lengths_N.device) < lengths_N[:, None]
    kept_NGK = order_NGK.masked_fill(~valid_NK[:, None, :], T).sort(-1).values
    return kept_NGK.masked_fill(~valid_NK[:, None, :], 0), valid_NK
