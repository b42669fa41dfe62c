"""Selection against a loop written from the equation of section 3.2."""

import math

import pytest
import torch

from megatron_m3.ops.select_tokens import select_tokens, token_weights


def weights_by_loop(query, key, value, length, rule):
    """One reference, straight from the equation: query [T, H, D], key and value [T, G, D]."""
    _, H, D = query.shape
    G = key.shape[1]
    weight = torch.zeros(G, length, dtype=torch.float64)
    for head in range(H):
        group = head // (H // G)
        for i in range(length):
            products = [float(query[i, head] @ key[j, group]) / math.sqrt(D) for j in range(length)]
            powers = [math.exp(product) for product in products]
            total = 1.0 if rule == "exp" else sum(powers)
            for j in range(length):
                added = math.sqrt(float(value[j, group] @ value[j, group])) if rule == "value" else 1.0
                weight[group, j] += powers[j] / total * added
    return weight


@pytest.mark.parametrize("rule", ["softmax", "exp", "value"])
def test_weights_and_choice_equal_the_loop(rule):
    generator = torch.Generator().manual_seed(0)
    N, T, H, G, D, K = 3, 11, 4, 2, 8, 4
    query, key, value = (torch.randn(N, T, heads, D, generator=generator) for heads in (H, G, G))
    lengths = torch.tensor([11, 6, 2])
    weights = token_weights(query, key, lengths, rule, value)
    indices, valid = select_tokens(query, key, lengths, K, rule, value_NTGD=value)
    for n, length in enumerate(lengths.tolist()):
        expected = weights_by_loop(query[n], key[n], value[n], length, rule)
        got = weights[n, :, :length].double()
        torch.testing.assert_close(got.exp() if rule == "exp" else got, expected, rtol=1e-5, atol=1e-6)
        assert valid[n].tolist() == [k < length for k in range(K)]
        for g in range(G):
            best = sorted(sorted(range(length), key=lambda j: -expected[g, j])[:K])
            assert indices[n, g, : len(best)].tolist() == best


def test_equal_weights_keep_the_earlier_token():
    query, key = torch.zeros(1, 10, 2, 4), torch.zeros(1, 10, 1, 4)
    indices, _ = select_tokens(query, key, torch.tensor([10]), 3)
    assert indices.tolist() == [[[0, 1, 2]]]


def test_a_missing_reference_keeps_nothing():
    query, key = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 1, 4)
    indices, valid = select_tokens(query, key, torch.tensor([0, 5]), 2)
    assert valid.tolist() == [[False, False], [True, True]]
    assert indices[0].tolist() == [[0, 0]]


def test_padding_does_not_matter():
    query, key = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 4)
    short = select_tokens(query[:, :5], key[:, :5], torch.tensor([5]), 3)
    query[:, 5:], key[:, 5:] = 100.0, 100.0
    padded = select_tokens(query, key, torch.tensor([5]), 3)
    assert torch.equal(short[0], padded[0])
    assert torch.equal(short[1], padded[1])


def test_preferred_tokens_come_first_and_others_fill_up():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(3, 9, 4, 8, generator=generator), torch.randn(3, 9, 2, 8, generator=generator)
    lengths, K = torch.tensor([9, 5, 2]), 4
    preferred = torch.stack([torch.arange(9) % 3 == 0, torch.arange(9) % 3 == 1])
    weights = token_weights(query, key, lengths)
    indices, valid = select_tokens(query, key, lengths, K, preferred_GT=preferred)
    for n, length in enumerate(lengths.tolist()):
        for g in range(2):
            order = sorted(range(length), key=lambda j: (not preferred[g, j], -float(weights[n, g, j])))
            assert indices[n, g, valid[n]].tolist() == sorted(order[:K])
