"""Lines to score made from any text: their references hold the questions and the answers."""

import json

import pytest

from data_tools import passages
from megatron_m3.errors import ConfigError, DataError
from megatron_m3.tokenizer import Tokenizer, train_tokenizer
from tests.tiny_model import sentence


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passages")
    texts = [" ".join(sentence(seed + place, 9) + "." for place in range(12)) for seed in range(0, 300, 12)]
    (folder / "in.jsonl").write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n"
                                             for n, text in enumerate(texts)))
    train_tokenizer(texts, 300, folder / "tokenizer")
    return folder


def make(corpus, output, *more):
    passages.main(["--input", str(corpus / "in.jsonl"), "--tokenizer", str(corpus / "tokenizer"), "--output",
                   str(output), "--reference-length", "40", "--context-tokens", "5", "--target-tokens", "7", *more])
    return [[json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
            for name in ("passages", "calibration")]


def test_answers_stand_in_the_passage_behind_their_questions(corpus, tmp_path):
    scored, calibration = make(corpus, tmp_path / "a", "--lines", "10")
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    assert len(scored) == len(calibration) == 10
    for line in scored + calibration:
        assert line["context"] + line["target"] in line["references"][0]
        assert 30 <= len(tokenizer.encode(line["references"][0])) <= 40
        assert line["context"].strip()
        assert line["target"].strip()
    assert not {line["id"] for line in scored} & {line["id"] for line in calibration}
    assert len({line["references"][0].index(line["context"]) for line in scored}) > 1


def test_the_same_corpus_gives_the_same_lines(corpus, tmp_path, capsys):
    first, second = make(corpus, tmp_path / "a", "--lines", "8"), make(corpus, tmp_path / "b", "--lines", "8")
    assert first == second
    make(corpus, tmp_path / "a", "--lines", "8")
    assert "made already" in capsys.readouterr().out


def test_too_little_text_is_refused(corpus, tmp_path):
    with pytest.raises(DataError, match="passages of 30 to 40 tokens; 2,000 are needed"):
        make(corpus, tmp_path / "a", "--lines", "1000")
    with pytest.raises(ConfigError, match="a passage must hold 60 tokens"):
        make(corpus, tmp_path / "a", "--target-tokens", "55")
    assert not (tmp_path / "a").exists()
