"""Transform codes: bits go where they lower the error most, codes are exact bytes, more bytes are less error."""

import pytest
import torch

from megatron_m3.ops.codec.transform import NORMAL_ERRORS, TransformCode

CLASSES, COUNT, SIZE = 3, 4000, 12


@pytest.fixture(scope="module")
def vectors():
    """Normal vectors with known covariances, different for each class, far from 0."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0, 3, SIZE).exp()
    turns = torch.linalg.qr(torch.randn(CLASSES, SIZE, SIZE, generator=generator)).Q
    drawn = torch.randn(CLASSES, COUNT, SIZE, generator=generator) * spread
    return drawn @ turns + 50 * torch.randn(CLASSES, 1, SIZE, generator=generator)


def error(vectors, code):
    after = code.decode(code.encode(vectors), torch.arange(CLASSES))
    centred = vectors - vectors.mean(1, keepdim=True)
    return float((after - vectors).square().sum() / centred.square().sum())


def even(weight=1.0):
    return weight * torch.eye(SIZE).expand(CLASSES, SIZE, SIZE)


@pytest.mark.parametrize("code_bytes", [1, 3, 5, 12])
def test_codes_have_the_bytes_asked_for_and_the_error_that_their_bits_imply(vectors, code_bytes):
    code = TransformCode.train(vectors, even(), code_bytes)
    assert code.code_bytes == code_bytes
    assert code.encode(vectors).shape == (CLASSES, COUNT, code_bytes)
    assert (code.bits_CD.int().sum(1) == 8 * code_bytes).all()
    variance = torch.linspace(0, 6, SIZE).exp()
    implied = sum(
        float(sum(NORMAL_ERRORS[int(bits)] * one for bits, one in zip(row, variance, strict=True)) / variance.sum())
        for row in code.bits_CD
    ) / CLASSES
    assert error(vectors, code) == pytest.approx(implied, rel=0.15)


def test_bits_of_a_class_cannot_be_better_shared():
    from megatron_m3.ops.codec.transform import _share_bits

    variance = torch.tensor([[100.0, 10.0, 1.0, 0.1]])
    bits = _share_bits(variance, 9)[0].int().tolist()

    def cost(shared):
        return sum(NORMAL_ERRORS[count] * float(one) for count, one in zip(shared, variance[0], strict=True))

    for source in range(4):
        for target in range(4):
            moved = list(bits)
            moved[source] -= 1
            moved[target] += 1
            if min(moved) >= 0:
                assert cost(bits) <= cost(moved) + 1e-9


def test_weights_say_which_errors_matter(vectors):
    heavy = even().clone()
    heavy[:, 0, 0] = 1e4
    plain, weighted = (TransformCode.train(vectors, weights, 4) for weights in (even(), heavy))

    def first(code):
        after = code.decode(code.encode(vectors), torch.arange(CLASSES))
        return float((after - vectors)[..., 0].square().mean())

    assert first(weighted) < 0.2 * first(plain)
    assert error(vectors, weighted) > error(vectors, plain)
    scaled = TransformCode.train(vectors, even(7.0), 4)
    assert error(vectors, scaled) == pytest.approx(error(vectors, plain), rel=1e-3)


def test_some_classes_are_decoded_alone(vectors):
    code = TransformCode.train(vectors, even(), 5)
    codes, some = code.encode(vectors), torch.tensor([2, 0])
    assert torch.equal(code.decode(codes[some.numpy()], some), code.decode(codes, torch.arange(CLASSES))[some])


def test_a_number_that_never_changes_costs_nothing(vectors):
    still = vectors.clone()
    still[..., 0] = 3.0
    code = TransformCode.train(still, even(), 6)
    after = code.decode(code.encode(still), torch.arange(CLASSES))
    assert (after[..., 0] - 3.0).abs().max() < 0.05
