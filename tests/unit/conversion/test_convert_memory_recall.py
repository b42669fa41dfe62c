"""``m3 convert to-hf --memory``: transformers opens our banks and generates with recall as ``m3 generate`` does."""

import ast
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_convert.hf_memory import bank_memory3, modeling_memory3
from ckpt_convert.to_hf import ToOptions, convert
from launch.m3 import main
from tests.knowledge import build_knowledge
from tests.launcher import run_command
from tests.tiny_model import joined_world, sentence, tiny_model

FAMILIES = {"llama": {}, "qwen3": {"model__qk_norm": "true"}, "qwen2": {"model__qkv_bias": "true"}, "mistral": {}}
BANKS = [("llama", "none", "all"), ("llama", "KLT12", "all"), ("qwen3", "none", "all"), ("qwen3", "SQ4", "all"),
         ("qwen2", "KLT20", "all"), ("mistral", "fp8", "all"), ("llama", "none", "1:1;2:0"),
         ("qwen2", "KLT20", "1:1;2:0,1"), ("qwen3", "SQ4", "1:0,1;2:1")]
PROMPT_WORDS, NEW_TOKENS = (0, 1, 5, 14), 20


def save_model(folder: Path, family: str) -> None:
    """A checkpoint of random weights, norms and biases too."""
    from megatron_m3.model.checkpoint import save_checkpoint

    folder.mkdir()
    loaded = tiny_model(folder, memory__layers="1-2", **FAMILIES[family])
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    data = dataclasses.replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
    save_checkpoint(folder / "run", 3, [loaded.model], dataclasses.replace(loaded.config, data=data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A knowledge base; the tokenizers of all models are equal."""
    folder = tmp_path_factory.mktemp("memory_folder")
    with pytest.MonkeyPatch.context() as patch, joined_world():
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(str(folder / "modules"))
        save_model(folder / "llama", "llama")
        build_knowledge(folder, folder / "llama" / "tokenizer", count=40, words=10, reference_length=16)
        yield folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[str], Path]:
    """Folder of a family, made once."""
    @functools.cache
    def exported(family: str) -> Path:
        output = folder / f"hf_{family}"
        if not (folder / family).exists():
            save_model(folder / family, family)
        convert(ToOptions(source=str(folder / family / "run"), output=str(output), family=family, memory=True))
        return output

    return exported


@pytest.fixture(scope="module")
def bank(folder: Path) -> Callable[..., Path]:
    """Bank of a family, made once for each codec and memory heads."""
    @functools.cache
    def bank(family: str, codec: str, heads: str = "all") -> Path:
        output = folder / f"bank_{family}_{codec}_{heads}"
        main(["bank", "build", "--checkpoint", str(folder / family / "run"), "--references",
              str(folder / "references"), "--output", str(output), "--codec", codec, "--block-size", "16",
              "--memory-heads", heads])
        return output

    return bank


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def engine_of(folder: Path, family: str, bank: Path) -> Any:
    """What ``m3 generate`` runs."""
    from launch.engine import EngineOptions, build_engine

    return build_engine(EngineOptions(checkpoint=str(folder / family / "run"), references=str(folder / "references"),
                                      index=str(folder / "index"), bank=str(bank)))


def knowledge(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ("index", "references")}


def prompts(engine: Any) -> list[list[int]]:
    """No token, less than a chunk of 8, a whole chunk, and several chunks."""
    return [engine.loaded.tokenizer.encode(sentence(seed, words)) for seed, words in enumerate(PROMPT_WORDS)]


def summary(generation: Any) -> list[Any]:
    """Tokens, and what each chunk read."""
    return [generation.tokens, generation.ended, *(
        (chunk.part, chunk.first_token, [(one.id, pytest.approx(one.score)) for one in chunk.references])
        for chunk in generation.chunks
    )]


@pytest.mark.parametrize(("family", "codec", "heads"), BANKS)
def test_transformers_generates_what_the_engine_does(folder: Path, exported: Any, bank: Any, family: str, codec: str,
                                                     heads: str) -> None:
    model = load(exported(family))
    assert type(model).__name__.startswith("Memory3")
    bank_folder = bank(family, codec, heads)
    engine = engine_of(folder, family, bank_folder)
    assert engine.config.memory.heads == heads
    ids, stop_at_eos = prompts(engine), family == "mistral"
    expected, _ = engine.generate_tokens(ids, NEW_TOKENS, stop_at_eos=stop_at_eos)
    model.open_bank(bank_folder, **knowledge(folder))
    assert type(model.bank).__module__.startswith("transformers_modules."), "the folder's own files are run"
    found = model.generate_with_recall(ids, max_new_tokens=NEW_TOKENS, stop_at_eos=stop_at_eos)
    assert [summary(one) for one in found] == [summary(one) for one in expected]
    assert any(one.ended for one in found) == stop_at_eos
    assert {chunk.first_token for one in found for chunk in one.chunks if chunk.part == "generated"} == {0, 8, 16}


@pytest.fixture(scope="module")
def opened(folder: Path, exported: Any, bank: Any) -> tuple[Any, Any]:
    """A model with its bank, and the engine."""
    model, path = load(exported("llama")), bank("llama", "none")
    model.open_bank(path, **knowledge(folder))
    return model, engine_of(folder, "llama", path)


def test_memories_matter(opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = opened
    prompt, fetch = prompts(engine)[3], model.bank.fetch
    found = model.generate_with_recall(prompt, max_new_tokens=NEW_TOKENS)
    monkeypatch.setattr(model.bank, "fetch", lambda ids: fetch([]))
    assert model.generate_with_recall(prompt, max_new_tokens=NEW_TOKENS) != found


def test_draws_are_the_engines_and_depend_on_the_seed(opened: tuple[Any, Any]) -> None:
    from megatron_m3.inference.sampling import Sampling

    model, engine = opened
    ids = [prompts(engine)[2]] * 2
    texts = set()
    for seed in (1, 2):
        options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": seed}
        expected, _ = engine.generate_tokens(ids, 12, Sampling(**options), stop_at_eos=False)
        found = model.generate_with_recall(ids, max_new_tokens=12, stop_at_eos=False, **options)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        texts |= {tuple(one.tokens) for one in found}
    assert len(texts) == 4


def test_padding_and_bos_do_not_matter(opened: tuple[Any, Any]) -> None:
    model, engine = opened
    ids, bos = prompts(engine)[1:], engine.loaded.tokenizer.bos_id
    longest = max(map(len, ids)) + 1
    rows = torch.tensor([[*[7] * (longest - 1 - len(row)), bos, *row] for row in ids])
    mask = torch.tensor([[*[0] * (longest - 1 - len(row)), 1, *[1] * len(row)] for row in ids])
    expected = model.generate_with_recall(ids, max_new_tokens=10)
    assert model.generate_with_recall(rows, mask, max_new_tokens=10, token_type_ids=mask) == expected
    assert model.generate_with_recall(ids[0], max_new_tokens=10) == expected[:1]


def test_a_retriever_of_ones_own(opened: tuple[Any, Any], exported: Any, bank: Any) -> None:
    """Asked for each chunk; what is not valid is not read, and its id may be anything."""
    model, (_, engine), asked = load(exported("llama")), opened, []

    def retriever(chunks: Sequence[Sequence[int]], k: int) -> tuple[Any, Any, Any]:
        asked.extend(map(list, chunks))
        return np.array([[3, -9]] * len(chunks)), np.ones((len(chunks), k)), np.array([[True, False]] * len(chunks))

    model.open_bank(bank("llama", "none"), retriever)
    prompt = prompts(engine)[3][:12]
    (found,) = model.generate_with_recall([prompt], max_new_tokens=20, stop_at_eos=False)
    assert asked == [prompt[:8], prompt[8:], found.tokens[:8], found.tokens[8:16]]
    assert {one.id for chunk in found.chunks for one in chunk.references} == {3}


def test_plain_generation_is_transformers_own(exported: Any, opened: tuple[Any, Any]) -> None:
    """With the modelling file, also after a recall, and without it."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(exported("llama"))
    assert type(plain).__name__ == "LlamaForCausalLM"
    model, engine = opened
    ids = torch.tensor([[engine.loaded.tokenizer.bos_id, *prompts(engine)[3]]])
    model.generate_with_recall(ids, max_new_tokens=1)
    assert model.config._attn_implementation == plain.config._attn_implementation
    expected = plain.generate(ids, max_new_tokens=10, do_sample=False)
    assert model.generate(ids, max_new_tokens=10, do_sample=False).equal(expected)


def test_a_saved_model_keeps_its_memory(opened: tuple[Any, Any], tmp_path: Path, bank: Any, folder: Path) -> None:
    model, engine = opened
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_bytes((folder / "hf_llama" / "tokenizer.json").read_bytes())
    again = load(tmp_path / "saved")
    again.open_bank(bank("llama", "none"), **knowledge(folder))
    ids = prompts(engine)
    assert [one.tokens for one in again.generate_with_recall(ids, max_new_tokens=10)] == [
        one.tokens for one in model.generate_with_recall(ids, max_new_tokens=10)]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Change a manifest and sign it again; its hash."""
    from megatron_m3.manifest import Manifest, write_manifest

    fields = json.loads((path / "manifest.json").read_text())
    del fields["hash"]
    change(fields)
    write_manifest(path, Manifest(**fields))
    return Manifest(**fields).hash


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    (target / "codec").mkdir()
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(("change", "reason"), [
    (lambda fields: fields.update(schema=1), "bank schema 1, not 2: this modelling file does not know it"),
    (lambda fields: fields["settings"].update(heads="1"), "bank setting heads: this modelling file"),
    (lambda fields: fields["inputs"].update(tokenizer="0" * 64), "made from another tokenizer"),
    (lambda fields: fields["settings"].update(prefix="See:"), "written with prefix 'See:'"),
    (lambda fields: fields.update(kind="index"), "is of kind index, not bank"),
    (lambda fields: fields["inputs"].update(codec="0" * 64), "made from another codec"),
])
def test_a_bank_that_the_file_does_not_know_is_refused(opened: tuple[Any, Any], tmp_path: Path, change: Any,
                                                       reason: str) -> None:
    model, _ = opened
    path = copy_of(model.bank.folder, tmp_path / "bank")
    rewrite(path, change)
    with pytest.raises(ValueError, match=reason) as caught:
        model.open_bank(path, retriever=model.retrieve)
    assert "\n" not in str(caught.value)


def test_other_references_than_the_banks_are_refused(opened: tuple[Any, Any], tmp_path: Path, folder: Path) -> None:
    model, _ = opened
    path = copy_of(model.bank.folder, tmp_path / "bank")
    rewrite(path, lambda fields: fields["inputs"].update(references="0" * 64))
    with pytest.raises(ValueError, match="made from other references than"):
        model.open_bank(path, **knowledge(folder))


def test_a_codec_that_the_file_does_not_know_is_refused(opened: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = opened
    path = copy_of(model.bank.folder, tmp_path / "bank")
    hash = rewrite(path / "codec", lambda fields: fields["settings"].update(kind="best"))
    rewrite(path, lambda fields: fields["inputs"].update(codec=hash))
    with pytest.raises(ValueError, match="codec kind best: this modelling file does not know it"):
        model.open_bank(path, retriever=model.retrieve)


def test_a_bank_of_another_model_is_refused(exported: Any, bank: Any, opened: tuple[Any, Any], folder: Path) -> None:
    model = load(exported("qwen3"))
    with pytest.raises(ValueError, match="made from another checkpoint"):
        model.open_bank(bank("llama", "none"), **knowledge(folder))
    with pytest.raises(ValueError, match="no bank: call open_bank"):
        model.generate_with_recall([[5]])


def test_an_edited_bank_is_read_once_it_is_compacted(opened: tuple[Any, Any], bank: Any, tmp_path: Path) -> None:
    from megatron_m3.memory.editing import compact_bank, delete_references

    model, _ = opened
    path = copy_of(bank("llama", "none"), tmp_path / "bank")
    delete_references(path, np.array([3]))
    with pytest.raises(ValueError, match="was edited; fold the edits in with `m3 bank compact`"):
        model.open_bank(path, retriever=model.retrieve)
    compact_bank(path)
    # what a killed compaction would have left
    (path / "shard_000000.bin").write_bytes((model.bank.folder / "shard_000000.bin").read_bytes())
    edited = type(model.bank)(path, model.config.memory)
    assert edited.fetch([3]).shape[3] == 0
    assert edited.fetch([2, 17]).equal(model.bank.fetch([2, 17]))


def test_damage_is_seen(opened: tuple[Any, Any], bank: Any, tmp_path: Path) -> None:
    model, _ = opened
    path = copy_of(bank("llama", "KLT12"), tmp_path / "bank")
    model_bank = type(model.bank)(path, model.config.memory)
    size = (path / "shard_000000.bin").stat().st_size // 16
    whole = (path / "shard_000001.bin").read_bytes()
    for place in (3 * size, 3 * size + size // 2, 4 * size - 13, 4 * size - 9, 4 * size - 1):
        data = bytearray(whole)
        data[place] ^= 4
        (path / "shard_000001.bin").write_bytes(data)
        model_bank.fetch([18, 20])
        with pytest.raises(ValueError, match=r"shard_000001\.bin: the record of reference 19 is damaged"):
            model_bank.fetch([19])
    with pytest.raises(ValueError, match="reference 40 is not in 0-39"):
        model_bank.fetch([40])
    (path / "shard_000001.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="missing or cut short"):
        model.open_bank(path, retriever=model.retrieve)
    (path / "shard_000001.bin").write_bytes(whole)
    file = path / "codec" / "keys_and_values.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"keys_and_values\.safetensors: checksum differs"):
        model.open_bank(path, retriever=model.retrieve)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": 1e-320},
                                     {"top_k": -1}, {"top_p": 0.0}])
def test_options_that_cannot_be_are_refused(opened: tuple[Any, Any], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="generate_with_recall: max_new_tokens must be"):
        opened[0].generate_with_recall([[5]], **options)


def test_open_bank_says_what_is_missing(opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = opened
    path = model.bank.folder
    for given in ({}, {"index": "a"}, {"index": "a", "references": "b", "retriever": print}):
        with pytest.raises(ValueError, match="either a retriever, or index and references"):
            model.open_bank(path, **given)
    monkeypatch.setitem(sys.modules, "megatron_m3.retrieval", None)
    with pytest.raises(ImportError, match="index and references need the package megatron_m3") as caught:
        model.open_bank(path, index="a", references="b")
    assert "\n" not in str(caught.value)


def test_neither_megatron_core_nor_the_package_is_needed() -> None:
    """The files import transformers and what it brings; our retriever, where it is used, does without megatron-core."""
    for module in (bank_memory3, modeling_memory3):
        tree = ast.parse(Path(module.__file__ or "").read_text())
        imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                    for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        others = {str(name).split(".")[0] for name in imported} - sys.stdlib_module_names
        assert others <= {"torch", "transformers", "safetensors", "numpy", "ckpt_convert"}
    code = ("import sys, megatron_m3.retrieval, megatron_m3.tokenizer; "
            "sys.exit(any(name.split('.')[0] in ('megatron', 'torch') for name in sys.modules))")
    run_command([sys.executable, "-c", code])
