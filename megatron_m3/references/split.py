"""Cut a text into references: each a text of its own that fits the limit, cut at a sentence end where one is near.

A cut falls at the last line or sentence end that leaves at least half a reference, else between words, else (a word
longer than a reference) between characters. No text is lost but the blanks around a cut.
"""

import bisect
import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_m3.errors import DataError
from megatron_m3.tokenizer import Tokenizer

SENTENCE_END = re.compile(r"(?=\n)|(?<=[.!?…])[\"'”’)\]]*(?=\s)|(?<=[。！？])")
WORD_END = re.compile(r"(?<=\S)(?=\s)")


class Piece(NamedTuple):
    """One reference."""

    text: str
    tokens: list[int]
    """Token ids of ``text`` tokenized by itself."""
    first_token: int
    """Where it begins, in tokens of the whole text."""


def split_text(tokenizer: Tokenizer, text: str, limit: int) -> list[Piece]:
    """References of at most ``limit`` tokens that together hold ``text``; one, unchanged, if it fits."""
    spans = tokenizer.token_spans(text)
    if len(spans) <= limit:
        return [Piece(text, tokenizer.encode(text), 0)]
    starts = [first for first, _ in spans] + [len(text)] * limit
    sentences, words = ([m.end() for m in ends.finditer(text)] + [len(text)] for ends in (SENTENCE_END, WORD_END))
    pieces, start = [], 0
    while start < len(text):
        first = bisect.bisect_left(starts, start)
        for cut in _cuts(sentences, words, start, half=starts[first + limit // 2], last=starts[first + limit]):
            piece = text[start:cut].strip()
            tokens = tokenizer.encode(piece)
            if len(tokens) <= limit:
                break
        else:
            raise DataError(f"the character {text[start]!r} alone takes more than {limit} tokens; allow more")
        if tokens:
            pieces.append(Piece(piece, tokens, first))
        start = cut
    return pieces


def _cuts(sentences: list[int], words: list[int], start: int, half: int, last: int) -> Iterator[int]:
    """Places to cut a piece that begins at character ``start``, best first.

    ``half`` and ``last`` are where half and all of the limit end, to within what a cut changes in tokenization.
    """
    for ends, lowest in ((sentences, max(half, start + 1)), (words, start + 1)):
        yield from reversed(ends[bisect.bisect_left(ends, lowest) : bisect.bisect_right(ends, last)])
    yield from range(last, start, -1)
