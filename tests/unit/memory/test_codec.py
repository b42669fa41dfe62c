"""Codecs: training is deterministic, too little data is refused by name, and `auto` takes what the data allow."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError, M3Error


def fake_memories(count, head_size=16, seed=0):
    """Memories of random numbers, keys larger than values; 2 layers, 2 heads, 4 tokens."""
    from megatron_m3.memory import ExplicitMemories

    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(count, 2, 2, 2, 4, head_size, generator=generator) * torch.linspace(0.1, 1, head_size)
    kv[:, :, 0] *= 10
    return ExplicitMemories(kv=kv, positions=torch.zeros(count, 2, 2, 4, dtype=torch.int16),
                            num_kept=torch.full((count,), 4, dtype=torch.int32))


def even_sensitivity(head_size=16):
    """Readers that notice every direction alike, of a model that turns keys by no angle; 2 layers, 2 heads."""
    from megatron_m3.memory.sensitivity import Sensitivity

    even = torch.eye(head_size).expand(2, 2, head_size, head_size)
    return Sensitivity(frequency=torch.zeros(head_size // 2).double(), query_LGDD=even, value_LGDD=even)


def test_the_papers_codec_is_14_bytes():
    from megatron_m3.ops.codec import vectors_needed
    from megatron_m3.ops.codec.reference import make_index

    assert make_index("OPQ20_80,Residual2x14,PQ8x10", 80).sa_code_size() == 14
    assert vectors_needed("OPQ20_80,Residual2x14,PQ8x10") == 638_976


@pytest.mark.parametrize(("head_size", "kept_tokens", "name"), [
    (80, 1280, "KLT28"), (64, 1024, "KLT28"), (64, 1023, "fp8"), (128, 2048, "KLT45"), (16, 256, "KLT7"),
])
def test_auto_takes_the_papers_rate_where_the_sample_allows(head_size, kept_tokens, name):
    from megatron_m3.memory.codecs import SampleSize, resolve_codec

    sample = SampleSize(references=kept_tokens, kept_tokens=kept_tokens, num_lists=3)
    assert resolve_codec("auto", head_size, sample) == name


@pytest.mark.parametrize(("factory", "needed"), [
    ("PQ8", 9984), ("PQ8x4", 624), ("OPQ8_32,PQ16x6", 9984), ("RQ4x6", 2496), ("SQ8", 1), ("IVF300,PQ4x4", 11700),
    ("Residual2x10,PQ8x6", 39936), ("PRQ2x3x7", 4992), ("PCAR16,SQ4", 1),
])
def test_vectors_needed_follow_the_largest_codebook(factory, needed):
    from megatron_m3.ops.codec import vectors_needed

    assert vectors_needed(factory) == needed


def test_training_gives_the_same_bytes_whatever_the_threads():
    import faiss

    from megatron_m3.memory import train_codec

    sample, threads = fake_memories(700), faiss.omp_get_max_threads()
    try:
        codecs = []
        for count in (1, 2):
            faiss.omp_set_num_threads(count)
            codecs.append(train_codec("RQ4x5", sample))
            assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)
    assert codecs[0].key.to_bytes() == codecs[1].key.to_bytes()
    assert codecs[0].value.to_bytes() == codecs[1].value.to_bytes()
    assert codecs[0].key.to_bytes() != codecs[0].value.to_bytes()


def test_two_codebooks_keep_values_better_than_one():
    from megatron_m3.memory import train_codec

    sample = fake_memories(700)
    apart, shared = train_codec("PQ8x4", sample), train_codec("PQ8x4", sample, shared=True)
    assert shared.is_shared
    assert not apart.is_shared
    assert apart.errors(sample)[1] < 0.5 * shared.errors(sample)[1]


@pytest.mark.parametrize("name", ["PQ8x4", "none", "fp8", "SQ8", "KLT11"])
def test_a_saved_codec_is_the_codec(tmp_path, name):
    from megatron_m3.memory import load_codec, train_codec

    sample = fake_memories(700)
    codec = train_codec(name, sample, dtype="bf16", sensitivity=even_sensitivity)
    saved = codec.save(tmp_path / "codec", {})
    loaded, hash = load_codec(tmp_path / "codec")
    assert (hash, loaded.name, loaded.token_bytes) == (saved, codec.name, codec.token_bytes)
    assert np.array_equal(loaded.encode(sample), codec.encode(sample))
    assert torch.equal(loaded.round_trip(sample).kv, codec.round_trip(sample).kv)
    assert loaded.round_trip(sample[:0]).kv.shape == sample[:0].kv.shape
    again = train_codec(name, sample, dtype="bf16", sensitivity=even_sensitivity)
    assert again.save(tmp_path / "again", {}) == saved


@pytest.mark.parametrize(("name", "file"), [("SQ8", "keys.faiss"), ("KLT8", "keys_and_values.safetensors")])
def test_a_damaged_codec_is_refused(tmp_path, name, file):
    from megatron_m3.memory import load_codec, train_codec

    train_codec(name, fake_memories(30), sensitivity=even_sensitivity).save(tmp_path / "codec", {})
    path = tmp_path / "codec" / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{file}: checksum differs"):
        load_codec(tmp_path / "codec")


def test_raw_codecs_keep_the_numbers():
    from megatron_m3.memory.codec import SeparateCodec

    sample = fake_memories(5)
    assert torch.equal(SeparateCodec.none(16, "fp32").round_trip(sample).kv, sample.kv)
    assert torch.equal(SeparateCodec.none(16, "bf16").round_trip(sample).kv, sample.kv.bfloat16().float())
    assert (SeparateCodec.none(16, "fp32").token_bytes, SeparateCodec.none(16, "bf16").token_bytes) == (128, 64)


@pytest.mark.parametrize("name", ["SQ8", "fp8", "KLT16"])
def test_empty_slots_are_zero_and_teach_nothing(name):
    from megatron_m3.memory import train_codec

    sample = fake_memories(300)
    short = dataclasses.replace(sample, num_kept=torch.full((300,), 2, dtype=torch.int32))
    assert short.vectors(0, torch.ones(2, 2, dtype=torch.bool)).shape == (300 * 2 * 2 * 2, 16)
    codec = train_codec(name, short, sensitivity=even_sensitivity)
    poisoned = dataclasses.replace(short, kv=short.kv.index_fill(4, torch.tensor([2, 3]), 1e4))
    assert np.array_equal(codec.encode(poisoned), codec.encode(short))
    other = train_codec(name, poisoned, sensitivity=even_sensitivity)
    assert np.array_equal(other.encode(short), codec.encode(short))
    out = codec.round_trip(short)
    assert (out.kv[..., 2:, :] == 0).all()
    assert (out.kv[..., :2, :] != 0).any()


@pytest.mark.parametrize(("name", "said"), [
    ("Residual2x14,PQ8x10", r"codec=Residual2x14,PQ8x10: needs 638,976 keys .* of 9 references has 144"),
    ("PQ7x8", r"codec=PQ7x8: FAISS makes no standalone codec of it for head size 16"),
    ("KLT33", r"codec=KLT33: takes at most 32 bytes for head size 16"),
    ("KLT8", r"codec=KLT8: needs 64 kept tokens .* of 9 references has 36"),
    ("HNSW32", r"codec=HNSW32: FAISS makes no standalone codec"),
    ("nonsense", r"codec=nonsense: FAISS makes no standalone codec"),
])
def test_an_impossible_codec_is_refused_by_name(name, said):
    from megatron_m3.memory import train_codec

    with pytest.raises(ConfigError, match=said) as error:
        train_codec(name, fake_memories(9))
    assert "\n" not in str(error.value)


def test_memories_that_are_not_finite_are_refused():
    from megatron_m3.memory import train_codec
    from megatron_m3.memory.codec import SeparateCodec

    sample = fake_memories(300)
    sample.kv[7, 0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(M3Error, match="not finite"):
        train_codec("SQ8", sample)
    with pytest.raises(M3Error, match="not finite"):
        SeparateCodec.none(16).encode(sample)


def test_keys_are_turned_back_by_their_positions():
    """Keys of one word differ by the rotation of their place alone, and so cost nothing."""
    from megatron_m3.memory import ExplicitMemories, train_codec
    from megatron_m3.model.rope import Rope

    sample, rope = fake_memories(300), Rope(16, 10000.0)
    positions = torch.randint(0, 128, (300, 2, 2, 4), generator=torch.Generator().manual_seed(3)).to(torch.int16)
    same = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(4)).expand(300, 2, 2, 4, 16)
    angle = positions[..., None].double() * rope.frequency
    first, second = same.chunk(2, -1)
    keys = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    kv = torch.stack([keys.float(), sample.kv[:, :, 1]], 2)
    memories = ExplicitMemories(kv=kv, positions=positions, num_kept=sample.num_kept)

    def turning():
        return dataclasses.replace(even_sensitivity(), frequency=rope.frequency)

    codec = train_codec("KLT8", memories, sensitivity=turning)
    still = train_codec("KLT8", memories, sensitivity=even_sensitivity)
    assert codec.errors(memories)[0] < 1e-6
    assert still.errors(memories)[0] > 1e-3
    kept = codec.decode(codec.encode(memories)[:, 1::2], positions[:, :, 1:], memories.num_kept, slice(1, 2))
    assert torch.equal(kept, codec.round_trip(memories).kv[:, :, :, 1:])
