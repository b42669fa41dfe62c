"""GGUF files: llama.cpp's order of rows, quantised tensors, its metadata, checked against transformers' own reader."""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ckpt_convert.from_hf import FromOptions, convert
from ckpt_convert.mapping import gguf_names
from ckpt_convert.sources import open_model
from megatron_m3.errors import UnsupportedError
from megatron_m3.model.rope import Rope
from tests.hf_models import make_model
from tests.tiny_model import joined_world

Kind = gguf.GGMLQuantizationType
SCALING = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    with joined_world():
        yield


def permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp's own converter stores them."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(folder: Path, path: Path, kind: Kind, extra: dict[str, int | str] | None = None) -> None:
    """A GGUF file of a Hugging Face folder, as llama.cpp writes it; matrices are stored as ``kind``."""
    source, fields = open_model(folder), json.loads((folder / "config.json").read_text())
    model, family = source.model, source.family
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(model.num_layers)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.ffn_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_context_length(model.max_positions)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(model.vocab_size)
    for name, value in (extra or {}).items():
        writer.kv_data[0].pop(f"{family}.{name}", None)
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(f"{family}.{name}", value)
    backend = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    tokens += [f"[unused{place}]" for place in range(len(tokens), model.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in ("<s>", "</s>") else gguf.TokenType.NORMAL
                            for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    weights = load_file(folder / "model.safetensors")
    for ours, theirs in gguf_names(model).items():
        data = weights[theirs].float().numpy()
        if family == "llama" and (".attn_q." in ours or ".attn_k." in ours):
            data = permuted(data, model.num_heads if ".attn_q." in ours else model.num_kv_heads)
        stored = kind if data.ndim == 2 else Kind.F32
        writer.add_tensor(ours, gguf.quants.quantize(data, stored), raw_dtype=stored)
    if fields.get("rope_parameters", {}).get("rope_type") == "llama3":
        factors = Rope(model.head_size, model.rope_theta).frequency / Rope.of(model).frequency
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("case", "kind"), [("llama", Kind.Q8_0), ("llama3 tied", Kind.Q4_0),
                                             ("qwen2 tied", Kind.F16), ("qwen3", Kind.BF16)])
def test_a_gguf_file_computes_what_transformers_makes_of_it(tmp_path: Path, case: str, kind: Kind) -> None:
    from ckpt_convert.sides import open_side
    from ckpt_convert.verify import verify

    # blocks of quantised rows have 32 numbers
    changes = {"hidden_size": 64, "head_dim": 16 if case == "qwen2 tied" else 32}
    if case == "llama3 tied":
        changes["rope_parameters"] = SCALING
    folder = make_model(tmp_path / "hf", case, **changes)
    write_gguf(folder, tmp_path / "m.gguf", kind)
    summary = convert(FromOptions(source=str(tmp_path / "m.gguf"), output=str(tmp_path / "ours")))
    assert (summary["dtype"], summary["bos"], summary["eos"]) == ("fp32", "<s>", "</s>")
    findings = verify(open_side(tmp_path / "m.gguf", 1, 1), open_side(tmp_path / "ours", 1, 1), 1e-4)
    assert all(finding.passed for finding in findings), findings


def test_llama_3s_scaling_is_read_off_its_factors(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "hf", "llama", rope_parameters=SCALING)
    write_gguf(folder, tmp_path / "m.gguf", Kind.F32)
    source = open_model(tmp_path / "m.gguf")
    assert source.model == open_model(folder).model
    assert source.model.rope_factor == 32.0
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert torch.equal(source.rows(name, 3, 29), open_model(folder).rows(name, 3, 29)), "any rows, not whole heads"


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("expert_count", 8, "num_experts=8"), ("attention.sliding_window", 128, "sliding_window=128"),
    ("rope.scaling.type", "yarn", "rope.scaling.type=yarn"), ("rope.scaling.factor", 4, "rope.scaling.type=linear"),
    ("rope.scale_linear", 2, "rope.scaling.type=linear"), ("attention.value_length", 8, "attention.value_length=8"),
])
def test_metadata_of_other_models_is_refused_by_name(tmp_path: Path, name: str, value: int | str, reason: str) -> None:
    folder = make_model(tmp_path / "hf", "qwen3")
    write_gguf(folder, tmp_path / "m.gguf", Kind.F32, {name: value})
    with pytest.raises(UnsupportedError, match=reason):
        open_model(tmp_path / "m.gguf")
