"""Texts as words, many at once in numpy: what the filter counts and what duplicates are told by.

A word is a run of letters, marks and digits, in lower case, apostrophes left out; in scripts written without spaces
(Chinese, Japanese, Thai, ...) each letter is a word.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

APART, LETTER, NUMBER, ALONE, NOTHING = range(5)
"""Kinds of character: between words, letter or mark, digit, a word by itself, not there."""
WITHOUT_SPACES = ((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007),
                  (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
                  (0xFF66, 0xFF9D), (0x20000, 0x323AF))
"""Thai, Lao, Tibetan, Burmese, Khmer, kana and Han."""
LEFT_OUT = "'’ʼ\u00ad\u200b\u200c\u200d\ufeff"
SPACE = 32
CHARACTERS_AT_A_TIME = 1 << 16
"""Of short texts together, so that their arrays stay in the cache."""
BASE = 0x9E3779B97F4A7C15
"""Odd; powers of it are the weights of the characters in a hash."""


@functools.cache
def kinds_of_characters() -> np.ndarray:
    """The kind of every code point, uint8."""
    table = np.full(0x110000, APART, np.uint8)
    for code in range(0x32400):
        category = unicodedata.category(chr(code))
        if category[0] in "LM":
            table[code] = LETTER
        elif category[0] == "N":
            table[code] = NUMBER
    for first, last in WITHOUT_SPACES:
        part = table[first : last + 1]
        part[part != APART] = ALONE
    table[[ord(character) for character in LEFT_OUT]] = NOTHING
    return table


@functools.cache
def _weights(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of ``BASE`` and of its inverse, mod 2^64."""
    inverse = pow(BASE, -1, 1 << 64)
    steps = np.full((2, count), [[BASE], [inverse]], np.uint64)
    steps[:, 0] = 1
    powers = np.cumprod(steps, axis=1)
    return powers[0], powers[1]


def mix(values: np.ndarray) -> np.ndarray:
    """64-bit numbers spread over all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Words(NamedTuple):
    """The words of some texts, one text after the other."""

    codes: np.ndarray
    """uint32: code points of the words, one space between two."""
    starts: np.ndarray
    ends: np.ndarray
    """First character of each word, and one past its last."""
    firsts: np.ndarray
    """int64 [texts + 1]: the first word of each text, and one past the last of all."""
    letters: np.ndarray
    """int64 [texts]: characters that are letters or marks."""
    characters: np.ndarray
    """int64 [texts]: characters of the texts, composed."""

    @property
    def counts(self) -> np.ndarray:
        """int64 [texts]: words."""
        return np.diff(self.firsts)

    def spelt(self, text: int) -> bytes:
        """The words of a text, as UTF-32 little-endian."""
        first, last = self.firsts[text], self.firsts[text + 1]
        return self.codes[self.starts[first] : self.ends[last - 1]].tobytes() if first < last else b""

    def hashes(self, run: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """uint64: a hash of each run of ``run`` words of a text, of all words where it has fewer; int64 [texts + 1]:
        the first hash of each text, and one past the last of all."""
        counts = self.counts
        runs = np.maximum(np.minimum(counts, 1), counts - run + 1)
        offsets = np.append(0, np.cumsum(runs))
        begins = np.arange(offsets[-1]) + np.repeat(self.firsts[:-1] - offsets[:-1], runs)
        starts, ends = self.starts[begins], self.ends[begins + np.repeat(np.minimum(counts, run), runs) - 1]
        powers, inverses = _weights(1 << max(10, len(self.codes).bit_length()))
        sums = np.zeros(len(self.codes) + 1, np.uint64)
        np.cumsum((self.codes.astype(np.uint64) + np.uint64(1)) * powers[: len(self.codes)], out=sums[1:])
        return mix((sums[ends] - sums[starts]) * inverses[starts]), offsets


def split_words(texts: Sequence[str]) -> Iterator[Words]:
    """The words of ``texts``, some texts at a time."""
    begin = held = 0
    for index, text in enumerate(texts):
        if held and held + len(text) > CHARACTERS_AT_A_TIME:
            yield _split(texts[begin:index])
            begin, held = index, 0
        held += len(text) + 1
    if held:
        yield _split(texts[begin:])


def _split(texts: Sequence[str]) -> Words:
    lower = [unicodedata.normalize("NFC", text).lower() for text in texts]
    codes = np.frombuffer(" ".join([*lower, ""]).encode("utf-32-le"), "<u4")  # a space after each
    bounds = np.cumsum([0, *(len(text) + 1 for text in lower)])
    characters = np.diff(bounds) - 1
    kinds = kinds_of_characters()[codes]
    alone, kept = kinds == ALONE, kinds != NOTHING
    letters = np.add.reduceat((kinds == LETTER) | alone, bounds[:-1], dtype=np.int64)
    if not kept.all():
        codes, kinds, alone, bounds = codes[kept], kinds[kept], alone[kept], np.append(0, np.cumsum(kept))[bounds]
    if alone.any():
        codes, kinds, bounds = _set_apart(codes, kinds, alone, bounds)
    inside = np.append(False, kinds != APART)
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    firsts = np.searchsorted(starts, bounds)
    codes = np.where(inside[1:], codes, np.uint32(SPACE))
    inside[1:][ends] = True  # one character between words
    codes = codes[inside[1:]]
    lengths = ends - starts
    ends = np.cumsum(lengths + 1) - 1
    return Words(codes, ends - lengths, ends, firsts, letters, characters)


def _set_apart(
    codes: np.ndarray, kinds: np.ndarray, alone: np.ndarray, bounds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The characters with a space on either side of those that are words by themselves; where texts begin then."""
    begins = np.append(0, np.cumsum(np.where(alone, 3, 1)))
    places = begins[:-1] + alone
    wide, wide_kinds = np.full(begins[-1], SPACE, np.uint32), np.full(begins[-1], APART, np.uint8)
    wide[places], wide_kinds[places] = codes, np.where(alone, LETTER, kinds)
    return wide, wide_kinds, begins[bounds]
