"""Codecs compute on a CUDA device what they compute on the CPU, but for numbers between two codes."""

import pytest
import torch

from tests.unit.memory.test_codec import even_sensitivity, fake_memories

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu"),
]


@pytest.mark.parametrize("name", ["none", "fp8", "KLT6", "OPQ4_16,PQ4x4", "SQ4"])
def test_a_device_gives_the_codes_and_the_numbers_of_the_cpu(name):
    from megatron_m3.memory import train_codec

    memories = fake_memories(3000)
    codec = train_codec(name, memories, sensitivity=even_sensitivity)
    there, memories_there = codec.to("cuda"), memories.to("cuda", torch.float32)
    codes, codes_there = codec.encode(memories), there.encode(memories_there)
    assert (codes != codes_there).any(-1).mean() < 1e-3
    kv = codec.decode(codes, memories.positions, memories.num_kept)
    kv_there = there.decode(codes, memories.positions, memories.num_kept)
    assert kv_there.is_cuda
    torch.testing.assert_close(kv_there.cpu(), kv, rtol=1e-5, atol=1e-4)
    assert (codes_there == there.encode(memories_there)).all()


def test_late_memories_are_coded_beside_the_pass_that_follows():
    from megatron_m3.memory import train_codec
    from megatron_m3.memory.encode import LateMemories
    from megatron_m3.memory.record import RecordLayout

    memories = fake_memories(3000)
    codec = train_codec("KLT6", memories, sensitivity=even_sensitivity)
    layout = RecordLayout(held_LG=torch.ones(2, 2, dtype=torch.bool), num_kept_tokens=4, token_bytes=codec.token_bytes)
    busy = torch.randn(4096, 4096, device="cuda")
    late = LateMemories([memories[:1000].to("cuda", torch.float32), memories[1000:].to("cuda", torch.float32)],
                        torch.arange(3000).flip(0))
    for _ in range(20):
        busy = torch.tanh(busy @ busy)
    records = late.records(codec.to("cuda"), layout)
    backwards = memories[torch.arange(3000).flip(0)]
    plain = layout.pack(codec.encode(backwards), backwards.positions, backwards.num_kept)
    assert (records != plain).any(-1).mean() < 1e-3
