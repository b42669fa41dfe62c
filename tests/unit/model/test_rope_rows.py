"""RoPE of a joint sequence's rows: one table for any number of references among them."""

import torch

from megatron_m3.config import get_recipe


def layout_of(config, count):
    from megatron_m3.model.layout import JointLayout

    return JointLayout(config=config, prefix_length=3, context_length=20,
                       reference_lengths_BN=torch.ones(2, count, dtype=torch.int64))


def test_rows_have_their_positions_whatever_number_of_references_stands_before_them():
    from megatron_m3.model import layout
    from megatron_m3.model.layout import trunk_positions
    from megatron_m3.model.rope import Rope

    config = get_recipe("tiny")
    length, generator = config.memory.reference_length, torch.Generator().manual_seed(1)
    layout._table.cache_clear()
    for count in range(config.num_references + 1):
        head = count * length
        rows = torch.randn(head + 23, 2, 2, config.model.head_size, generator=generator)
        references, trunk = layout_of(config, count).rotated(head, rows, rows, rows)
        positions = torch.cat([(3 + torch.arange(length)).repeat(count), trunk_positions(3, length, 20)])
        expected = Rope.of(config.model).rotate(rows, positions[:, None]).transpose(0, 1)
        assert torch.equal(torch.cat([references[0], trunk[0]], 1), expected)
    assert layout._table.cache_info().misses == 1, "copying it to a device anew would wait for the device each time"
