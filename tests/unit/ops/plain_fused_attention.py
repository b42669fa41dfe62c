"""The functions that the te backend calls in Transformer Engine, in plain torch, as its documentation describes them.

They compute on the CPU, take the same arguments, and refuse what they do not mean: tensors that do not lie in memory as
the layout says, statistics of another shape or dtype. The backward pass follows cuDNN's: a weight is ``exp(score -
statistic)``, a row's share ``sum(grad * out)``.
"""

import torch

from megatron_m3.ops.memory_attention.te_backend import Library


def starts(batch, length, device):
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def _heads_first(part, form, heads):
    """``[B, H, T, D]`` in fp64, key-value heads repeated."""
    assert part.is_contiguous(), "Transformer Engine takes a tensor's order in memory from the layout alone"
    first = part.permute((1, 2, 0, 3) if form == "sbhd" else (0, 2, 1, 3)).double()
    return first.repeat_interleave(heads // first.shape[1], 1)


def _as_it_lies(part_BHTD, form, dtype):
    return part_BHTD.permute((2, 0, 1, 3) if form == "sbhd" else (0, 2, 1, 3)).to(dtype).contiguous()


def _scores(q, k, num_queries, num_keys, mask):
    assert mask == ("causal" if num_queries == num_keys else "causal_bottom_right")
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)


def _check(layout, o_format, bias, window, bottom_right, mask, sizes, q, k):
    form = layout.split("_")[0]
    assert (layout, o_format, bias, window) == (f"{form}_{form}_{form}", form, "no_bias", (-1, 0))
    assert bottom_right == (mask == "causal_bottom_right")
    batch, rows = (1, 0) if form == "sbhd" else (0, 1)
    for length, found, part in zip(sizes[:2], sizes[2:], (q, k), strict=True):
        assert length == part.shape[rows]
        assert torch.equal(found, starts(part.shape[batch], length, "cpu"))
    return form


def forward(is_training, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype,
            fused_attention_backend, *, qkv_layout, o_format, attn_bias_type, attn_mask_type, window_size,
            bottom_right_diagonal):
    assert (is_training, fused_attention_backend) == (True, "a kernel")
    assert q.dtype == k.dtype == v.dtype == fake_dtype
    form = _check(qkv_layout, o_format, attn_bias_type, window_size, bottom_right_diagonal, attn_mask_type,
                  (max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv), q, k)
    heads = q.shape[2]
    query, key, value = (_heads_first(part, form, heads) for part in (q, k, v))
    score = _scores(query, key, max_seqlen_q, max_seqlen_kv, attn_mask_type)
    statistics = score.logsumexp(-1, keepdim=True)
    out = torch.exp(score - statistics) @ value
    wide = torch.promote_types(fake_dtype, torch.float32)
    return _as_it_lies(out, form, fake_dtype), [statistics.to(wide), torch.zeros(2, dtype=torch.int64)]


def backward(max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
             fused_attention_backend, *, qkv_layout, o_format, do_format, dqkv_layout, attn_bias_type, attn_mask_type,
             window_size, bottom_right_diagonal, deterministic):
    assert fused_attention_backend == "a kernel"
    assert (do_format, dqkv_layout, deterministic) == (o_format, qkv_layout, False)
    form = _check(qkv_layout, o_format, attn_bias_type, window_size, bottom_right_diagonal, attn_mask_type,
                  (max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv), q, k)
    heads, groups = q.shape[2], k.shape[2]
    query, key, value, out, grad = (_heads_first(part, form, heads) for part in (q, k, v, o, d_o))
    statistics, state = aux_ctx_tensors
    assert (statistics.shape, state.shape) == ((*query.shape[:3], 1), (2,))
    assert statistics.is_contiguous()
    assert statistics.dtype == torch.promote_types(fake_dtype, torch.float32)
    weight = torch.exp(_scores(query, key, max_seqlen_q, max_seqlen_kv, attn_mask_type) - statistics.double())
    d_score = weight * (grad @ value.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    gradients = d_score @ key, *(part.unflatten(1, (groups, heads // groups)).sum(2) for part in (
        d_score.transpose(2, 3) @ query, weight.transpose(2, 3) @ grad))
    return *(_as_it_lies(part, form, fake_dtype) for part in gradients), None, None


PLAIN = Library(forward, backward, starts, lambda setting: "a kernel")
