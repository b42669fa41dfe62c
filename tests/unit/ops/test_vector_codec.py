"""Vector codecs: product codes are FAISS's own except on ties, whatever the batch; decoding goes where it is wanted."""

import functools

import numpy as np
import pytest
import torch

FAMILY = ["PQ8x9", "PQ4x5", "PQ2x12", "OPQ4_16,Residual2x6,PQ8x9", "OPQ4_12,PQ4x6", "PCA8,Residual2x5,PQ4x3",
          "RR16,Residual50,PQ4x4", "Residual300,PQ16x4"]
OTHERS = ["SQ4", "RQ2x4", "ITQ16,PQ4x4", "L2norm,PQ4x4", "PCAW8,PQ4x4", "IVF8,PQ4x4"]


def vectors(count, seed=0):
    """Vectors of 16 numbers that are like a head's keys: correlated, some large, far from 0."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, 16)) @ np.random.default_rng(99).normal(size=(16, 16))
    return (mixed * np.geomspace(1, 20, 16) + 30).astype(np.float32)


@functools.cache
def trained(factory):
    """A FAISS index, roughly trained, for :func:`vectors`."""
    import faiss

    from megatron_m3.ops.codec.reference import make_index

    index = make_index(factory, 16)
    if factory.startswith("OPQ"):
        faiss.downcast_VectorTransform(index.chain.at(0)).niter = 2
    # few vectors for each centroid, but enough of them for ties to be possible
    index.train(vectors(4096 if "x12" in factory else 600))
    return index


@pytest.fixture(autouse=True)
def two_threads_afterwards():
    """Tests may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def errors(index, codes, whole):
    """Squared error of what codes stand for, float64 [N]."""
    return np.square(index.sa_decode(codes).astype(np.float64) - whole).sum(1)


@pytest.mark.parametrize("scale", [1, 1e-3, 30])
@pytest.mark.parametrize("factory", FAMILY)
def test_codes_are_those_of_faiss_except_on_ties(factory, scale):
    from megatron_m3.ops.codec import FaissVectors

    codec, whole = FaissVectors(trained(factory)), (vectors(700, 1) * scale).astype(np.float32)
    assert codec.product
    ours, theirs = codec.encode(whole), codec.index.sa_encode(whole)
    differs = (ours != theirs).any(1)
    assert differs.mean() < 0.01
    # of a tie either side may be taken, and the next layer then codes another remainder
    mine, other = (errors(codec.index, codes[differs], whole[differs]) for codes in (ours, theirs))
    assert (np.abs(mine - other) <= 0.05 * other + 1e-5 * np.square(whole[differs]).sum(1)).all()


@pytest.mark.parametrize("factory", FAMILY)
def test_decoding_is_that_of_faiss(factory):
    from megatron_m3.ops.codec import FaissVectors

    codec = FaissVectors(trained(factory))
    codes = codec.index.sa_encode(vectors(4100, 2))
    truth = torch.from_numpy(codec.index.sa_decode(codes))
    out = torch.full((4100, 16), torch.nan)
    codec.decode_into(codes, out)
    assert (out - truth).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize("factory", ["OPQ4_16,Residual2x6,PQ8x9", "SQ4"])
def test_vectors_are_decoded_into_any_dtype_and_layout(factory):
    from megatron_m3.ops.codec import FaissVectors

    codec = FaissVectors(trained(factory))
    codes = codec.encode(vectors(5 * 3 * 4, 3)).reshape(5, 3, 4, -1)
    plain = torch.empty(5, 3, 4, 16)
    codec.decode_into(codes, plain)
    kv = torch.full((5, 2, 4, 3, 16), torch.nan, dtype=torch.bfloat16)
    codec.decode_into(codes, kv[:, 1].transpose(1, 2))
    assert torch.equal(kv[:, 1].transpose(1, 2), plain.bfloat16())
    assert kv[:, 0].isnan().all()
    nothing = torch.empty(0, 16)
    codec.decode_into(codec.encode(vectors(0)), nothing)


@pytest.mark.parametrize("factory", ["OPQ4_16,Residual2x6,PQ8x9", "RR16,Residual50,PQ4x4"])
def test_codes_depend_neither_on_the_batch_nor_on_threads(factory):
    from megatron_m3.ops.codec import FaissVectors

    codec, whole = FaissVectors(trained(factory)), vectors(1500, 4)
    torch.set_num_threads(1)
    codes = codec.encode(whole)
    for size, end in ((1, 20), (7, 70), (257, 1500)):
        parts = [codec.encode(whole[first : min(first + size, end)]) for first in range(0, end, size)]
        assert np.array_equal(np.concatenate(parts), codes[:end])
    order = np.random.default_rng(0).permutation(len(whole))
    assert np.array_equal(codec.encode(whole[order]), codes[order])
    torch.set_num_threads(2)
    assert np.array_equal(codec.encode(whole), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 100, 128, 1000, 4500])
def test_the_nearest_centroid_is_found_whatever_the_numbers(count, dtype):
    from megatron_m3.ops.codec.nearest import Centroids

    generator = torch.Generator().manual_seed(count)
    centroids = torch.randn(2, count, 6, generator=generator) * torch.tensor([1, 100.0]).view(2, 1, 1) + 50
    centroids[:, count // 2] = centroids[:, 0]
    near = centroids[:, torch.randint(count, (60,), generator=generator)]
    far = 50 + torch.randn(2, 20, 6, generator=generator) * torch.tensor([1e-4, 1e4, 1e12, 1e-12]).repeat(5)[:, None]
    cases = torch.cat([near, near + 1e-3, near + torch.randn(near.shape, generator=generator), far, 0 * far], 1)
    search = Centroids(centroids, dtype)
    found = search.nearest(cases, torch.empty(cases.shape[1] * search.scores, dtype=dtype))
    distance = (cases.double()[:, :, None] - centroids.double()[:, None]).square().sum(-1)
    assert torch.equal(found, distance.argmin(-1))


def test_products_in_other_numbers_give_the_same_codes(monkeypatch):
    from megatron_m3.ops.codec import ProductCode, product

    codes = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(product, "product_dtype", lambda device, dtype=dtype: dtype)
        codes.append(ProductCode.of(trained("OPQ4_16,Residual2x6,PQ8x9")).encode(torch.from_numpy(vectors(2000, 5))))
    assert torch.equal(*codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_of_a_cuda_device_are_those_of_the_cpu():
    from megatron_m3.ops.codec import ProductCode

    code, whole = ProductCode.of(trained("OPQ4_16,Residual2x6,PQ8x9")), torch.from_numpy(vectors(20000, 6))
    there, codes = code.to("cuda"), code.encode(whole)
    assert torch.equal(there.encode(whole.cuda()).cpu(), codes)
    out = torch.empty(whole.shape), torch.empty(whole.shape, device="cuda")
    code.decode(codes, out[0])
    there.decode(codes.cuda(), out[1])
    assert (out[0] - out[1].cpu()).abs().max() <= 2e-6 * out[0].abs().max()


@pytest.mark.parametrize("factory", OTHERS)
def test_other_constructions_stay_with_faiss(factory):
    from megatron_m3.ops.codec import FaissVectors

    codec, whole = FaissVectors(trained(factory)), vectors(50, 7)
    assert codec.product is None
    assert np.array_equal(codec.encode(whole), codec.index.sa_encode(whole))


def test_fp8_keeps_three_bits_of_every_number():
    from megatron_m3.ops.codec import Fp8Vectors

    whole = vectors(300, 8)
    codec = Fp8Vectors.train(whole)
    codes, out = codec.encode(whole), torch.empty(300, 16)
    assert (codes.shape, codes.dtype, codec.code_bytes) == ((300, 16), np.uint8, 16)
    codec.decode_into(codes, out)
    truth = torch.from_numpy(whole)
    assert ((out - truth).abs() <= truth.abs() / 16 + codec.scale * 2**-10).all()
    half = torch.empty(300, 16, dtype=torch.bfloat16)
    codec.decode_into(codes, half)
    assert torch.equal(half.float(), out)
    codec.decode_into(codec.encode(np.full((1, 16), -1e9, np.float32)), large := torch.empty(1, 16))
    assert (large == -448 * codec.scale).all()
    assert codec.scale * 224 < np.abs(whole).max() <= codec.scale * 448
