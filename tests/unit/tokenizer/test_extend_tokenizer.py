"""A tokenizer with a second language: nothing changes for the first, and the second gets shorter."""

import json

import pytest
import regex

from data_tools import tokenizer as job
from megatron_m3.errors import ConfigError, UnsupportedError
from megatron_m3.manifest import Manifest, hash_file, write_manifest
from megatron_m3.tokenizer import Tokenizer, extend_tokenizer, train_tokenizer
from megatron_m3.tokenizer.extend import HAN

ENGLISH = ["The museum opens at nine, and the tickets are sold at the door.", "naïve café – “quoted” … €5 😀 ½",
           "Привет, мир! どうもありがとう", "def f(x):\n\treturn x**2  # 3.14", "A river runs through the town."] * 4
CHINESE = ["博物馆九点开门，门票在入口处出售。", "我们在博物馆门口见面，然后一起去老城。",
           "老城里有一条河，河上有一座桥。",
           "门票在网上也可以买到。", "博物馆的门票不贵，学生可以免费参观。", "龘"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_tokenizer(ENGLISH, 400, tmp_path_factory.mktemp("base") / "tokenizer")


@pytest.fixture(scope="module")
def extended(base, tmp_path_factory):
    return extend_tokenizer(base, CHINESE, 520, tmp_path_factory.mktemp("extended") / "tokenizer")


def test_text_without_the_second_language_has_the_same_ids(base, extended):
    for text in ENGLISH:
        assert extended.encode(text) == base.encode(text)


def test_tokens_of_the_base_keep_their_ids_and_none_is_twice(base, extended):
    old, new = base.backend.get_vocab(), extended.backend.get_vocab()
    assert {token: new[token] for token in old} == old
    assert len(set(new.values())) == len(new) == extended.vocab_size == 520
    assert (base.bos_id, base.eos_id) == (extended.bos_id, extended.eos_id)


def test_the_second_language_gets_markedly_shorter_and_decodes(base, extended):
    text = "".join(CHINESE)
    assert len(base.encode(text)) > 2.5 * len(text)
    assert len(extended.encode(text)) < 0.7 * len(text)
    for one in [*CHINESE, *ENGLISH, "mixed 博物馆 and 未知字 text，ok"]:
        assert extended.decode(extended.encode(one)) == one


def test_characters_come_before_sequences_where_room_is_short(base, tmp_path):
    few = extend_tokenizer(base, CHINESE, base.vocab_size + 40, tmp_path / "few")
    added = [few.decode([one]) for one in range(base.vocab_size, few.vocab_size)]
    assert len(added) == 40
    assert "门" in added
    assert all(len(token) == 1 for token in added)


def test_the_same_texts_give_the_same_tokenizer(base, extended, tmp_path):
    assert extend_tokenizer(base, iter(CHINESE), 520, tmp_path / "again").hash == extended.hash


def test_tokens_that_the_base_has_are_not_learnt_again(tmp_path):
    base = train_tokenizer([*ENGLISH, *CHINESE[:2] * 20], 450, tmp_path / "base")
    known = sum(bool(regex.fullmatch(f"[{HAN}]+", base.decode([one]))) for one in range(base.vocab_size))
    assert known > 5
    more = extend_tokenizer(base, CHINESE, 520, tmp_path / "more")
    texts = [more.decode([one]) for one in range(more.vocab_size)]
    whole = [text for text in texts if text and "�" not in text]
    assert len(set(whole)) == len(whole)
    assert more.vocab_size == 520


def test_a_base_with_byte_fallback(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    letters = sorted(set("".join(ENGLISH[:1])))
    vocab = {token: number for number, token in enumerate(
        ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "th", "the"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")], byte_fallback=True, unk_token=None))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(backend.to_str())
    write_manifest(folder, Manifest(kind="tokenizer", schema=1, inputs={}, settings={"bos": "<s>", "eos": "</s>"},
                                    files={"tokenizer.json": hash_file(folder / "tokenizer.json")}))
    base = Tokenizer.load(folder)
    more = extend_tokenizer(base, CHINESE, base.vocab_size + 100, tmp_path / "more")
    for text in ENGLISH:
        assert more.encode(text) == base.encode(text)
    text = "".join(CHINESE)
    assert len(base.encode(text)) == 3 * len(text)
    assert len(more.encode(text)) < 0.8 * len(text)
    assert more.decode(more.encode(text)) == text


def test_what_cannot_be_extended_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"the base has \d+ tokens already"):
        extend_tokenizer(base, CHINESE, base.vocab_size, tmp_path / "new")
    with pytest.raises(ConfigError, match="none of them in the texts"):
        extend_tokenizer(base, ENGLISH[:1], 500, tmp_path / "new")
    with pytest.raises(ConfigError, match="characters="):
        extend_tokenizer(base, CHINESE, 500, tmp_path / "new", characters="z-a")
    folder = tmp_path / "words"
    folder.mkdir()
    model = {"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<s>"}}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": []} | model))
    write_manifest(folder, Manifest(kind="tokenizer", schema=1, inputs={}, settings={"bos": "<s>", "eos": "</s>"},
                                    files={"tokenizer.json": hash_file(folder / "tokenizer.json")}))
    with pytest.raises(UnsupportedError, match="WordLevel"):
        extend_tokenizer(Tokenizer.load(folder), CHINESE, 500, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_shows_tokens_per_character(base, tmp_path, capsys):
    (tmp_path / "zh.txt").write_text("\n\n".join(CHINESE))
    options = job.Options(input=(str(tmp_path / "zh.txt"),), output=str(tmp_path / "out"), extend=str(base.folder),
                          vocab_size=520)
    job.run(options)
    line = capsys.readouterr().out.splitlines()[0].replace(",", "").split()
    assert line[:3] == ["tokens", "per", "character:"]
    assert float(line[3]) > 2.5
    assert float(line[5]) < 0.7
    job.run(options)
    assert "made already" in capsys.readouterr().out
