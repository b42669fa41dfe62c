import json
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import Manifest, hash_file, write_manifest
from megatron_m3.tokenizer import Tokenizer, train_tokenizer
from tests.launcher import run_command

TEXTS = ["The word entity means that which is perceived.", "Ein Wörterbuch; 日本語 ✓", "a\n\n b\t c"] * 5



@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "made")


@pytest.mark.parametrize("text", [*TEXTS[:3], "", " ", "  two  spaces ", "unseen: ÿ 𝄞 \x00 \u202e", "<s>x</s> <s>"])
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_plain_characters(tokenizer):
    ids = tokenizer.encode("<s> and </s>")
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids


def test_batch_equals_single(tokenizer):
    texts = [*TEXTS[:3], "", "<s>"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_prefix_is_bos_and_text(tokenizer):
    assert tokenizer.prefix_ids("Reference:") == [tokenizer.bos_id, *tokenizer.encode("Reference:")]


def test_token_spans_cover_the_text(tokenizer):
    text = TEXTS[0]
    spans = tokenizer.token_spans(text)
    assert len(spans) == len(tokenizer.encode(text))
    assert "".join(text[first:last] for first, last in spans) == text


def test_ids_stay_below_vocab_size(tokenizer):
    assert max(max(ids) for ids in tokenizer.encode_batch(TEXTS)) < tokenizer.vocab_size <= 400


def test_same_texts_give_the_same_bytes_in_another_process(tokenizer, tmp_path):
    code = ("import json, sys; from megatron_m3.tokenizer import train_tokenizer; "
            "train_tokenizer(json.loads(sys.argv[1]), 400, sys.argv[2])")
    run_command([sys.executable, "-c", code, json.dumps(TEXTS), str(tmp_path / "again")], env={"PYTHONHASHSEED": "7"})
    assert Tokenizer.load(tmp_path / "again").hash == tokenizer.hash


def test_a_copy_has_the_same_hash(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").hash == tokenizer.hash


def test_a_changed_byte_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        Tokenizer.load(tmp_path / "copy")


def test_an_existing_folder_is_not_overwritten(tokenizer, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="exists already"):
        tokenizer.save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_too_small_a_vocabulary_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=100: must be at least 258"):
        train_tokenizer(TEXTS, 100, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def make_foreign(folder, bos):
    backend = Backend(models.WordLevel({"[UNK]": 0, "hello": 1, "[BOS]": 2, "[EOS]": 5}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    files = {"tokenizer.json": hash_file(folder / "tokenizer.json")}
    write_manifest(folder, Manifest(kind="tokenizer", schema=1, inputs={}, settings={"bos": bos, "eos": "[EOS]"},
                                    files=files))


def test_any_tokenizer_json_with_a_manifest_loads(tmp_path):
    make_foreign(tmp_path / "foreign", "[BOS]")
    found = Tokenizer.load(tmp_path / "foreign")
    assert (found.bos_id, found.eos_id, found.vocab_size, found.encode("hello")) == (2, 5, 6, [1])


def test_a_special_token_that_is_not_there_is_refused(tmp_path):
    make_foreign(tmp_path / "foreign", "<s>")
    with pytest.raises(ArtifactError, match="the bos token '<s>' is not in"):
        Tokenizer.load(tmp_path / "foreign")
