"""Every family goes to our format and back, bit for bit, and computes what transformers computes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_convert.from_hf import FromOptions, convert, middle_layers
from ckpt_convert.to_hf import ToOptions
from ckpt_convert.to_hf import convert as convert_back
from megatron_m3.errors import ConfigError
from megatron_m3.model.checkpoint import load_model, read_checkpoint
from megatron_m3.tokenizer import Tokenizer
from tests.hf_models import CASES, make_model
from tests.tiny_model import joined_world


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    with joined_world():
        yield


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_round_trip_is_exact_and_both_ends_compute_alike(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    from ckpt_convert.sides import open_side
    from ckpt_convert.verify import verify

    source = make_model(tmp_path / "hf", case, dtype)
    summary = convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    assert summary["dtype"] == ("bf16" if dtype == torch.bfloat16 else "fp32")
    assert summary["parameters"] == sum(tensor.numel() for tensor in weights(source).values())
    convert_back(ToOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "back")))
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name
    if dtype == torch.float32:
        sides = [open_side(path, 1, 1) for path in (source, tmp_path / "ours")]
        assert {finding.check: finding.passed for finding in verify(*sides, 1e-4)} == dict.fromkeys(
            ("tensors", "tokenizer", "logits", "greedy tokens", "broken mapping"), True)


def test_what_comes_back_is_the_model_that_went(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = make_model(tmp_path / "hf", "llama3 tied")
    convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    convert_back(ToOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "back")))
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "back"))
    tokens = torch.arange(200)[None] % 515
    assert type(after) is type(before)
    assert torch.equal(after(tokens).logits, before(tokens).logits)
    assert after.config.rope_parameters == before.config.rope_parameters
    assert after.config.max_position_embeddings == before.config.max_position_embeddings
    names = [AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "back")]
    message = [{"role": "user", "content": "amber cordra"}]
    assert names[0].apply_chat_template(message) == names[1].apply_chat_template(message)
    assert (names[1].bos_token, names[1].eos_token) == ("<s>", "</s>")


def test_shards_come_in_and_go_out(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "hf", "qwen3", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    summary = convert_back(ToOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "back"),
                                     max_shard_size="150KB"))
    assert summary["files"] == len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    found, before = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict(), weights(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_the_checkpoint_is_one_like_any_other(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "qwen2 tied")
    summary = convert(FromOptions(source=str(source), output=str(tmp_path / "ours"), memory_layers="1"))
    loaded = load_model(tmp_path / "ours")  # compares the fingerprint with the loaded weights
    assert loaded.weights_hash == summary["weights_hash"]
    assert loaded.config.memory_layers == (1,)
    assert loaded.config.model.qkv_bias
    embedding = loaded.model.embedding.word_embeddings.weight
    assert embedding.shape[0] == 640
    assert not embedding[515:].any()
    assert embedding[:515].any(1).all()
    assert loaded.prefix_ids[0] == loaded.tokenizer.bos_id
    manifest = read_checkpoint(tmp_path / "ours" / "step_0000000")
    assert set(manifest.inputs) == {"source", "tokenizer"}
    convert(FromOptions(source=str(source), output=str(tmp_path / "again"), memory_layers="1"))
    assert read_checkpoint(tmp_path / "again" / "step_0000000").hash == manifest.hash, "same inputs, same bytes"


def test_a_model_trained_here_becomes_a_transformers_folder(tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ckpt_convert.sides import open_side
    from ckpt_convert.verify import verify
    from megatron_m3.model.checkpoint import save_checkpoint
    from tests.tiny_model import tiny_model

    made = tiny_model(tmp_path, model__tie_embeddings="true", model__vocab_multiple="100")
    config = replace(made.config, data=replace(made.config.data, tokenizer=str(tmp_path / "tokenizer")))
    save_checkpoint(tmp_path / "run", 7, [made.model], config)
    convert_back(ToOptions(source=str(tmp_path / "run"), output=str(tmp_path / "hf")))
    sides = [open_side(tmp_path / name, 1, 1) for name in ("run", "hf")]
    assert all(finding.passed for finding in verify(*sides, 1e-4))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.model_type == "llama"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.bos_token_id == made.tokenizer.bos_id
    with pytest.raises(ConfigError, match="family=qwen2"):
        convert_back(ToOptions(source=str(tmp_path / "run"), output=str(tmp_path / "no"), family="qwen2"))
    assert not (tmp_path / "no").exists()


def test_half_precision_is_widened_exactly_and_rounding_is_asked_for(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama", torch.float16)
    assert convert(FromOptions(source=str(source), output=str(tmp_path / "wide")))["dtype"] == "fp32"
    convert(FromOptions(source=str(source), output=str(tmp_path / "half"), dtype="bf16"))
    convert_back(ToOptions(source=str(tmp_path / "wide"), output=str(tmp_path / "back")))
    convert_back(ToOptions(source=str(tmp_path / "half"), output=str(tmp_path / "rounded")))
    before, wide, rounded = (weights(folder) for folder in (source, tmp_path / "back", tmp_path / "rounded"))
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in before.items())
    assert all(torch.equal(rounded[name], tensor.to(torch.bfloat16)) for name, tensor in before.items())


@pytest.mark.parametrize(("names", "bos", "reason"), [
    ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>", "bos_token"),
    ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}, "<s>", "bos_token"),
    ({"bos_token": None, "eos_token": "</s>", "pad_token": "<|endoftext|>"}, "<|endoftext|>", "<|endoftext|>"),
    ({"eos_token": "</s>", "pad_token": "<s>"}, "<s>", "pad_token"),
    ({"eos_token": "</s>"}, "</s>", "eos_token"),
])
def test_a_family_without_bos_takes_the_next_best(tmp_path: Path, names: dict[str, object], bos: str, reason: str,
                                                  ) -> None:
    from ckpt_convert.tokenizer_files import adopt_tokenizer
    from tests.hf_models import make_tokenizer

    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    if bos == "<|endoftext|>":
        backend = json.loads((tmp_path / "tokenizer.json").read_text())
        backend["added_tokens"].append(backend["added_tokens"][0] | {"id": 512, "content": bos})
        (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = adopt_tokenizer(tmp_path, tmp_path / "ours")
    assert (tokenizer.manifest.settings["bos"], tokenizer.manifest.settings["bos_is"]) == (bos, reason)
    assert Tokenizer.load(tmp_path / "ours").bos_id == tokenizer.backend.token_to_id(bos)


def test_the_middle_band() -> None:
    assert [middle_layers(count) for count in (30, 32, 4, 2, 1)] == ["8-24", "9-26", "1-3", "1-1", "0-0"]
