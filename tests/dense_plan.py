"""Attention written from the definition: explicit positions and a dense mask. The truth for memory tests."""

import torch


class DensePlan:
    """Every row has a position, and a mask says which rows it sees, layer by layer."""

    def __init__(self, config, positions_T, visible_of_layer):
        self.config, self.positions_T, self.visible_of_layer = config, positions_T, visible_of_layer

    def rotate(self, x_THD):
        half = x_THD.shape[-1] // 2
        frequency = self.config.model.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), self.positions_T[:, None].double() * frequency)
        turned = torch.complex(x_THD[..., :half].double(), x_THD[..., half:].double()) * turn[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    def attend(self, layer, query_SBHD, key_SBGD, value_SBGD):
        assert query_SBHD.shape[1] == 1
        query, key, value = self.rotate(query_SBHD[:, 0]), self.rotate(key_SBGD[:, 0]), value_SBGD[:, 0].double()
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        score = torch.einsum("thd,uhd->htu", query, key) / query.shape[-1] ** 0.5
        weight = score.masked_fill(~self.visible_of_layer(layer), float("-inf")).softmax(-1)
        return torch.einsum("htu,uhd->thd", weight, value)[:, None].to(query_SBHD.dtype)


def causal_plan(config, length):
    """A plain causal pass with positions from 0."""
    return DensePlan(config, torch.arange(length), lambda layer: torch.ones(length, length, dtype=torch.bool).tril())


def recompute_plan(config, prefix_length, reference_lengths, context_length, reads=None):
    """``[prefix | references | context]`` in one pass: references see the prefix and themselves.

    In memory layers context token i sees the references ``reads(i)`` (all by default) whole, in other layers none; nor
    do heads see any that are not memory heads.
    """
    part = [-1] * prefix_length
    positions = list(range(prefix_length))
    for number, length in enumerate(reference_lengths):
        part += [number] * length
        positions += range(prefix_length, prefix_length + length)
    first = len(part)
    positions += [prefix_length + config.memory.reference_length + i for i in range(context_length)]
    total = first + context_length
    causal = torch.ones(total, total, dtype=torch.bool).tril()

    def visible(layer, head):
        see = causal.clone()
        for row in range(prefix_length, total):
            for column in range(prefix_length, first):
                if row < first:
                    see[row, column] &= part[row] == part[column]
                else:
                    read = reads(row - first) if reads else range(len(reference_lengths))
                    see[row, column] = head in config.memory_heads.get(layer, ()) and part[column] in read
        return see

    heads, share = config.model.num_kv_heads, config.model.num_heads // config.model.num_kv_heads
    seen = {}
    for layer in range(config.model.num_layers):
        readers = config.memory_heads.get(layer, ())
        whole = visible(layer, readers[0] if readers else None)
        if 0 < len(readers) < heads:
            blind = visible(layer, None)
            whole = torch.stack([whole if head // share in readers else blind for head in range(heads * share)])
        seen[layer] = whole
    return DensePlan(config, torch.tensor(positions), seen.__getitem__)
