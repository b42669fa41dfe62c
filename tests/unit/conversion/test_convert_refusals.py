"""What our model cannot compute, or what is damaged, is refused by name before anything is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_convert.families import read_config
from ckpt_convert.from_hf import FromOptions, convert
from ckpt_convert.to_hf import ToOptions
from megatron_m3.errors import ArtifactError, ConfigError, M3Error, UnsupportedError
from megatron_m3.manifest.process import place
from megatron_m3.model.checkpoint import read_checkpoint
from megatron_m3.platform.progress import Progress
from tests.hf_models import LLAMA3, make_model
from tests.launcher import ended_process

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 4096}
OLD_LLAMA3 = {"rope_theta": 500000.0, "rope_scaling": {name: LLAMA3[name] for name in LLAMA3 if name != "rope_theta"}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain") / "hf", "llama")


@pytest.mark.parametrize(("changes", "name"), [
    ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts=8"),
    ({"model_type": "qwen2_moe"}, "model_type=qwen2_moe"),
    ({"model_type": "gemma2"}, "model_type=gemma2: unknown architecture; known are llama, mistral, qwen2, qwen3"),
    ({"model_type": "mistral"}, "sliding_window=4096"),
    ({"model_type": "mistral", "sliding_window": 1024}, "sliding_window=1024"),
    ({"model_type": "mistral", "sliding_window": 1024, "use_sliding_window": False}, "sliding_window=1024"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 2048}, "sliding_window=2048"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types=sliding_attention"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=yarn"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_type=default"),
    ({"attention_bias": True}, "attention_bias=true"),
    ({"mlp_bias": True}, "mlp_bias=true"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config=gptq"),
])
def test_features_are_refused_by_name(changes: dict[str, Any], name: str) -> None:
    if changes.get("model_type") == "mistral" and "sliding_window" not in changes:
        changes = changes | {"max_position_embeddings": 32768}
    with pytest.raises(UnsupportedError, match="config") as caught:
        read_config(CONFIG | changes, Path("config.json"))
    assert name in str(caught.value)


@pytest.mark.parametrize(("changes", "name"), [
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    ({"rope_scaling": "linear"}, "rope_scaling cannot be 'linear'"),
    ({"rope_parameters": LLAMA3 | {"factor": None}}, "lacks factor"),
    ({"rope_theta": "10k"}, "rope_theta cannot be '10k'"),
    ({"head_dim": "8"}, "head_dim cannot be '8'"),
])
def test_configs_that_cannot_be(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ArtifactError, match=name):
        read_config(CONFIG | changes, Path("config.json"))


def test_null_is_what_a_config_does_not_say() -> None:
    nothing = dict.fromkeys(("rms_norm_eps", "rope_theta", "rope_scaling", "head_dim", "hidden_act", "layer_types"))
    assert read_config(CONFIG | nothing, Path("c")) == read_config(CONFIG, Path("c"))


def test_both_notations_of_rope_are_read() -> None:
    new, old = (read_config(CONFIG | one, Path("c"))[1] for one in ({"rope_parameters": LLAMA3}, OLD_LLAMA3))
    assert new == old
    assert (new.rope_scaling, new.rope_factor, new.rope_original_positions) == ("llama3", 8.0, 32)
    assert read_config(CONFIG | {"rope_theta": 5e5}, Path("c"))[1].rope_theta == 5e5
    assert read_config(CONFIG | {"rope_parameters": {"rope_theta": 5e5}}, Path("c"))[1].rope_theta == 5e5


@pytest.mark.parametrize("changes", [
    {"model_type": "mistral", "sliding_window": None}, {"model_type": "mistral", "sliding_window": 4096},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 2048},
])
def test_a_window_that_is_never_reached_is_no_window(changes: dict[str, Any]) -> None:
    assert read_config(CONFIG | changes, Path("c"))[0] == changes["model_type"]


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_header(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["model.norm.weight"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


BREAKAGES = {
    "tensor model.norm.weight is missing": lambda folder: change_weights(folder, lambda t: t.pop("model.norm.weight")),
    "tensor score.weight is none of": lambda folder: change_weights(
        folder, lambda t: t.update({"score.weight": torch.ones(2, 48)})),
    "tensor model.norm.weight has shape": lambda folder: change_weights(
        folder, lambda t: t.update({"model.norm.weight": torch.ones(47)})),
    "is of type I64": lambda folder: change_weights(
        folder, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)})),
    "lm_head.weight differs from the embedding": lambda folder: change_config(folder, tie_word_embeddings=True),
    "cut short": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-8]),
    "not a safetensors file": lambda folder: (folder / "model.safetensors").write_bytes(b"\1\0"),
    "no model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "not a safetensors file .*offset": lambda folder: change_header(folder, data_offsets=[0, 48]),
    "not a safetensors file .*null": lambda folder: change_header(folder, dtype=None),
    "weight_map is missing": lambda folder: (
        (folder / "model.safetensors").unlink(), (folder / "model.safetensors.index.json").write_text("{}")),
    "tokenizer.json: not a readable tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "tokenizer.json is missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "config.json: missing, or not": lambda folder: (folder / "config.json").write_text("{"),
    "no EOS token": lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
    "the tokenizer has 331 tokens, the model 300": lambda folder: (
        change_config(folder, vocab_size=300), change_weights(folder, lambda t: t.update(
            {name: t[name][:300].contiguous() for name in ("lm_head.weight", "model.embed_tokens.weight")}))),
}


@pytest.mark.parametrize("reason", BREAKAGES)
def test_broken_models_leave_nothing(plain: Path, tmp_path: Path, reason: str) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "hf"))
    BREAKAGES[reason](source)
    with pytest.raises(M3Error, match=reason) as caught:
        convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "ours").glob("*"))


def test_a_copy_of_the_tied_embedding_is_no_extra_tensor(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama3 tied")
    change_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))
    manifest = read_checkpoint(tmp_path / "ours" / "step_0000000")
    assert manifest.settings["config"]["model"]["tie_embeddings"]


def test_a_tied_model_needs_its_embedding(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama3 tied")
    change_weights(source, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    with pytest.raises(ArtifactError, match=r"tensor model\.embed_tokens\.weight is missing"):
        convert(FromOptions(source=str(source), output=str(tmp_path / "ours")))


def test_an_index_that_another_saving_left_is_not_read(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "hf"))
    save_file({"old": torch.ones(1)}, source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"old": "model-00001-of-00001.safetensors"}}))
    for folder, output in ((source, "ours"), (plain, "of one file")):
        convert(FromOptions(source=str(folder), output=str(tmp_path / output)))
    ours, expected = (read_checkpoint(tmp_path / name / "step_0000000").settings for name in ("ours", "of one file"))
    assert ours["weights_hash"] == expected["weights_hash"]


@pytest.mark.parametrize("nothing", ["absent", "."])
def test_what_is_no_model(tmp_path: Path, nothing: str) -> None:
    with pytest.raises(ArtifactError, match="neither a Hugging Face folder, nor a GGUF file, nor a checkpoint"):
        convert(FromOptions(source=str(tmp_path / nothing), output=str(tmp_path / "ours")))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ArtifactError, match="not a readable GGUF file"):
        convert(FromOptions(source=str(tmp_path / "broken.gguf"), output=str(tmp_path / "ours")))


def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(plain: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_convert.to_hf import convert as convert_back

    jobs = [(convert, FromOptions(source=str(plain), output=str(tmp_path / "ours"))),
            (convert_back, ToOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "back")))]
    for job, options in jobs:
        count = iter(range(5))

        def stop(self: Progress, done: int, count: Any = count) -> None:
            if next(count) == 4:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "advance", stop)
            with pytest.raises(KeyboardInterrupt):
                job(options)
        assert not any(path.is_file() for path in tmp_path.rglob("*") if Path(options.output) in path.parents)
        # what a killed process would have left
        made = Path(options.output) / "step_0000000" if job is convert else tmp_path / "back"
        left = made.with_name(f".{made.name}.{place()}.{ended_process()}.tmp")
        left.mkdir(parents=True, exist_ok=True)
        (left / "half").write_text("")
        job(options)
        assert not left.exists()
        with pytest.raises(ArtifactError, match="exists already"):
            job(options)


def test_a_folder_that_holds_something_is_not_written_into(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        convert(FromOptions(source=str(plain), output=str(tmp_path / "ours")))


def test_a_damaged_checkpoint_is_not_converted(plain: Path, tmp_path: Path) -> None:
    from ckpt_convert.to_hf import convert as convert_back

    convert(FromOptions(source=str(plain), output=str(tmp_path / "ours")))
    with pytest.raises(ConfigError, match="is a checkpoint of ours already"):
        convert(FromOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "more")))
    path = tmp_path / "ours" / "step_0000000" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum differs"):
        convert_back(ToOptions(source=str(tmp_path / "ours"), output=str(tmp_path / "back")))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_shard_size=many"):
        ToOptions(source="a", output="b", max_shard_size="many")
    assert ToOptions(source="a", output="b", max_shard_size="2 MB").max_shard_bytes == 2_000_000
