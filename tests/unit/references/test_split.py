import bisect
import itertools
import random
import re

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from megatron_m3.errors import DataError
from megatron_m3.references import split_text
from megatron_m3.tokenizer import Tokenizer, train_tokenizer

TEXT = "a branch of the tree that bears leaves or fruit; 日本語の辞書 Dr. Smith's (old) house... “quoted” Wörter"
WORDS = [*TEXT.split(), "internationalization"]


def random_text(seed, words):
    draw = random.Random(seed)
    ends = ["", "", "", "", ".", "!", "?", ",", ".\n", "。"]
    return " ".join(draw.choice(WORDS) + draw.choice(ends) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([random_text(0, 500)], 380, tmp_path_factory.mktemp("tokenizer") / "made")


@pytest.mark.parametrize("limit", [8, 16, 31, 128])
@pytest.mark.parametrize("seed", range(5))
def test_pieces_fit_and_lose_nothing(tokenizer, limit, seed):
    text = random_text(seed, 200)
    pieces = split_text(tokenizer, text, limit)
    assert all(0 < len(piece.tokens) <= limit for piece in pieces)
    assert all(piece.tokens == tokenizer.encode(piece.text) for piece in pieces)
    assert "".join("".join(piece.text for piece in pieces).split()) == "".join(text.split())


SENTENCE_END = re.compile(r"(?=\n)|(?<=[.!?…])[\"'”’)\]]*(?=\s)|(?<=[。！？])")
WORD_END = re.compile(r"(?<=\S)(?=\s)")


def plain_split(tokenizer, text, limit):
    """What split_text does, each piece tokenized by itself and the ends found in the whole text."""
    starts = [first for first, _ in tokenizer.token_spans(text)] + [len(text)] * limit
    sentences, words = ([found.end() for found in ends.finditer(text)] + [len(text)]
                        for ends in (SENTENCE_END, WORD_END))
    pieces, start = [], 0
    while start < len(text):
        first = bisect.bisect_left(starts, start)
        half, last = starts[first + limit // 2], starts[first + limit]
        cuts = [cut for cut in sentences[::-1] if max(half, start + 1) <= cut <= last]
        cuts += [cut for cut in words[::-1] if start < cut <= last] + list(range(last, start, -1))
        cut = next(cut for cut in cuts if len(tokenizer.encode(text[start:cut].strip())) <= limit)
        if piece := text[start:cut].strip():
            pieces.append((piece, tokenizer.encode(piece), first))
        start = cut
    return pieces


@pytest.mark.parametrize("limit", [8, 31, 64])
def test_cuts_and_tokens_are_those_of_the_plain_rule(tokenizer, limit):
    draw = random.Random(limit)
    parts = [*"abcdefgABC" * 3, *"  \n\t.!?\"')]’”…,-01", "。", "日本", "é", " 's", "n't", "\u00a0", "\u3000", "...\n",
             ". ", '." ', "\r\n", " the ", "</s>"]
    assert tokenizer.splits_at_blanks
    for length in range(70, 700, 10):
        text = "".join(draw.choices(parts, k=length))
        if len(tokenizer.encode(text)) > limit:
            assert split_text(tokenizer, text, limit) == plain_split(tokenizer, text, limit)


def test_other_rules_of_words_are_not_taken_for_known(tokenizer):
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    other = Tokenizer(tokenizer.folder, tokenizer.manifest, backend)
    assert not other.splits_at_blanks
    text = random_text(3, 200)
    assert split_text(other, text, 32) == plain_split(other, text, 32)


@pytest.mark.parametrize("seed", range(5))
def test_first_token_is_where_the_piece_begins(tokenizer, seed):
    text = random_text(seed, 200)
    spans = tokenizer.token_spans(text)
    for piece in split_text(tokenizer, text, 32):
        assert text[spans[piece.first_token][0] :].lstrip().startswith(piece.text)


def test_a_text_that_fits_stays_as_it_is(tokenizer):
    text = "  a tree.\n that bears "
    (piece,) = split_text(tokenizer, text, len(tokenizer.encode(text)))
    assert piece == (text, tokenizer.encode(text), 0)


def test_one_token_too_many_makes_two(tokenizer):
    text = "a tree that bears fruit"
    assert len(split_text(tokenizer, text, 128)) == 1
    assert len(split_text(tokenizer, text * 10, len(tokenizer.encode(text * 10)) - 1)) == 2


def test_cuts_fall_at_sentence_ends(tokenizer):
    sentences = ["a branch of the tree.", "“that bears leaves or fruit?”", "a house of the tree!", "leaves bears fruit"]
    limit = max(len(tokenizer.encode(" ".join(pair))) for pair in itertools.pairwise(sentences)) + 1
    assert [piece.text for piece in split_text(tokenizer, " ".join(sentences), limit)] == [
        " ".join(sentences[:2]), " ".join(sentences[2:])]


def test_without_sentences_cuts_fall_between_words(tokenizer):
    words = ["branch", "leaves", "bears", "house"] * 20
    pieces = split_text(tokenizer, " ".join(words), 16)
    assert [word for piece in pieces for word in piece.text.split()] == words


def test_a_word_longer_than_a_reference_is_cut_between_characters(tokenizer):
    text = "x日" * 300
    pieces = split_text(tokenizer, text, 16)
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) <= len(tokenizer.encode(text)) / 16 * 1.5 + 1


def test_a_character_that_does_not_fit_is_an_error(tokenizer):
    with pytest.raises(DataError, match="alone takes more than 2 tokens"):
        split_text(tokenizer, "a𝄞b", 2)
