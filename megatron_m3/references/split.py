"""Cut a text into references: each a text of its own that fits the limit, cut at a sentence end where one is near.

A cut falls at the last line or sentence end that leaves at least half a reference, else between words, else (a word
longer than a reference) between characters. No text is lost but the blanks around a cut.
"""

import bisect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from megatron_m3.errors import DataError
from megatron_m3.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

MARK = re.compile(r"[\n.!?…。！？]")
CLOSING = re.compile(r"[\"'”’)\]]*(?=\s)")
WORD_END = re.compile(r"(?<=\S)(?=\s)")
FIRST_WORD = re.compile(r"[A-Za-z]++(?![^\x00-\x7f])")


class Piece(NamedTuple):
    """One reference."""

    text: str
    tokens: list[int]
    """Token ids of ``text`` tokenized by itself."""
    first_token: int
    """Where it begins, in tokens of the whole text."""


def split_text(
    tokenizer: Tokenizer, text: str, limit: int, encoding: "tokenizers.Encoding | None" = None
) -> list[Piece]:
    """References of at most ``limit`` tokens that together hold ``text``; one, unchanged, if it fits.

    ``encoding`` is that of ``text`` by :meth:`Tokenizer.encodings`, if it is there.
    """
    encoding = encoding or tokenizer.encodings([text])[0]
    if len(encoding) <= limit:
        return [Piece(text, encoding.ids, 0)]
    whole = _Whole(tokenizer, text, encoding)
    starts = whole.starts + [len(text)] * limit
    pieces, start = [], 0
    while start < len(text):
        first = bisect.bisect_left(starts, start)
        for cut in _cuts(text, start, half=starts[first + limit // 2], last=starts[first + limit]):
            piece = text[start:cut].strip()
            tokens = whole.tokens_of(piece, text.find(piece, start))
            if len(tokens) <= limit:
                break
        else:
            raise DataError(f"the character {text[start]!r} alone takes more than {limit} tokens; allow more")
        if tokens:
            pieces.append(Piece(piece, tokens, first))
        start = cut
    return pieces


class _Whole:
    """A tokenized text, that knows the tokens of pieces of it."""

    def __init__(self, tokenizer: Tokenizer, text: str, encoding: "tokenizers.Encoding") -> None:
        self.tokenizer, self.text, self.ids = tokenizer, text, encoding.ids
        self.starts = [first for first, _ in encoding.offsets]
        """The first character of each token."""

    def tokens_of(self, piece: str, start: int) -> list[int]:
        """Tokens of ``piece``, which begins at character ``start`` and is tokenized by itself.

        They are those of the whole text, but for the first word, which loses its blank; where words are tokenized one
        by one, and the piece begins with a word of letters and ends before a blank, that is known to be all.
        """
        end = start + len(piece)
        if self.tokenizer.splits_at_blanks and (end == len(self.text) or self.text[end] in " \n\t\r"):
            first = FIRST_WORD.match(self.text, start, end)
            if first and (start == 0 or self.text[start - 1] in " \n\t\r"):
                rest = bisect.bisect_left(self.starts, first.end())
                return [*self.tokenizer.encode_word(first[0]), *self.ids[rest : bisect.bisect_left(self.starts, end)]]
        return self.tokenizer.encode(piece)


def _cuts(text: str, start: int, half: int, last: int) -> Iterator[int]:
    """Places to cut a piece that begins at character ``start``, best first.

    ``half`` and ``last`` are where half and all of the limit end, to within what a cut changes in tokenization.
    """
    if last == len(text):
        yield last
    yield from reversed(_sentence_ends(text, max(half, start + 1), last))
    yield from reversed([found.end() for found in WORD_END.finditer(text, start + 1, last + 1) if found.end() <= last])
    yield from range(last, start, -1)


def _sentence_ends(text: str, lowest: int, last: int) -> list[int]:
    """Ends of lines and sentences from ``lowest`` to ``last``, ascending; closing quotes belong to the sentence."""
    begin = lowest
    while begin > 0 and text[begin - 1] in "\"'”’)]":
        begin -= 1
    ends = []
    for mark in MARK.finditer(text, max(begin - 1, 0), last + 1):
        if mark[0] == "\n":
            ends.append(mark.start())
        elif mark[0] in "。！？":
            ends.append(mark.end())
        elif closing := CLOSING.match(text, mark.end()):
            ends.append(closing.end())
    return [end for end in ends if lowest <= end <= last]
