"""Text piece by piece: nothing that a model may draw stops it, and the pieces join to the whole."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from megatron_m3.inference.writer import Writer

WORDS = ["▁", "▁Heron", "▁bird", "a", "é", "▁▁", "世", "s"]
BYTES = {"<s>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)},
         **{word: 258 + place for place, word in enumerate(WORDS)}}


class Decoding:
    """What a writer needs of a tokenizer."""

    def __init__(self, vocabulary, decoder):
        self.backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
        self.backend.decoder = decoder
        self.backend.add_special_tokens(["<s>", "</s>"])

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=True)


@pytest.fixture(scope="module")
def byte_fallback():
    """As Llama 2 decodes: words with a mark for a space, and bytes for what has no token; the first space goes."""
    return Decoding(BYTES, decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]))


@pytest.fixture(scope="module")
def byte_level():
    """As GPT-2 decodes: every token is some bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    return Decoding({"<s>": 0, "</s>": 1, **{letter: 2 + place for place, letter in enumerate(letters)}},
                    decoders.ByteLevel())


def pieces(tokenizer, ids, each=1):
    writer = Writer(tokenizer)
    found = [writer.push(ids[first : first + each]) for first in range(0, len(ids), each)]
    return [*found, writer.finish()]


@pytest.mark.parametrize("each", [1, 3])
def test_pieces_join_to_the_text_and_break_no_character(byte_fallback, each):
    generator = random.Random(0)
    letters = [*"ab é世🙂\n", *WORDS]
    for _ in range(300):
        text = "".join(generator.choices(letters, k=12))
        ids = [BYTES[letter] if letter in BYTES else 2 + byte
               for letter in text for byte in ([0] if letter in BYTES else letter.encode())]
        found = pieces(byte_fallback, ids, each)
        assert "".join(found) == byte_fallback.decode(ids)
        assert "\ufffd" not in "".join(found)


def test_tokens_that_are_no_text_stop_nothing(byte_fallback, byte_level):
    generator = random.Random(1)
    for _ in range(1000):
        ids = generator.choices(range(258 + len(WORDS)), k=12)
        assert all(word.strip("▁") in "".join(pieces(byte_fallback, ids)) for token in ids
                   if (word := (["", ""] + [""] * 256 + WORDS)[token]))
        ids = generator.choices(range(258), k=12)
        assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)
