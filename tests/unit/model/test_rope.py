"""The rotation against transformers' own, for the kinds that we take."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_m3.config import ModelConfig
from megatron_m3.model.rope import Rope


def compare(model: ModelConfig, parameters: dict[str, object]) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=parameters)
    positions = torch.tensor([[0, 1, 7, 100, 5000]])
    query = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(0))
    cosine, sine = LlamaRotaryEmbedding(config)(query, positions)
    theirs, _ = apply_rotary_pos_emb(query, query, cosine, sine)
    ours = Rope.of(model).rotate(query[0].transpose(0, 1), positions[0])
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=1e-3, atol=2e-3)


def test_plain_rotation():
    compare(ModelConfig(head_size=32, rope_theta=1e4), {"rope_type": "default", "rope_theta": 1e4})


def test_llama3_rotation():
    model = ModelConfig(head_size=32, rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0, rope_low_frequency=1.0,
                        rope_high_frequency=4.0, rope_original_positions=256)
    compare(model, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 256})
    plain = ModelConfig(head_size=32, rope_theta=5e5)
    frequency, scaled = Rope.of(plain).frequency, Rope.of(model).frequency
    assert frequency[0] == scaled[0]
    assert scaled[-1] == frequency[-1] / 8
    assert ((frequency[-1] / 8 < scaled) & (scaled < frequency)).any()
