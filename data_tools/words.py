"""A text as words, all at once in numpy: what the filter counts and what duplicates are told by.

A word is a run of letters, marks and digits, in lower case, apostrophes left out; in scripts written without spaces
(Chinese, Japanese, Thai, ...) each letter is a word.
"""

import functools
import unicodedata
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
    """The words of a text."""

    codes: np.ndarray
    """uint32: code points of the words, one space between two."""
    starts: np.ndarray
    ends: np.ndarray
    """First character of each word, and one past its last."""
    letters: int
    """Characters of the text that are letters or marks."""

    def text(self) -> str:
        """The words as one text."""
        return self.codes.tobytes().decode("utf-32-le")

    def hashes(self, run: int = 1) -> np.ndarray:
        """uint64: a hash of each run of ``run`` words; of all words where there are fewer."""
        if not len(self.starts):
            return np.zeros(0, np.uint64)
        run = min(run, len(self.starts))
        starts, ends = self.starts[: len(self.starts) - run + 1], self.ends[run - 1 :]
        count = 1 << max(10, len(self.codes).bit_length())
        powers, inverses = _weights(count)
        sums = np.zeros(len(self.codes) + 1, np.uint64)
        np.cumsum((self.codes.astype(np.uint64) + np.uint64(1)) * powers[: len(self.codes)], out=sums[1:])
        return mix((sums[ends] - sums[starts]) * inverses[starts])


def split_words(text: str) -> Words:
    """The words of ``text``."""
    codes = np.frombuffer(unicodedata.normalize("NFC", text).lower().encode("utf-32-le"), "<u4")
    kinds = kinds_of_characters()[codes]
    counts = np.bincount(kinds, minlength=5)
    if counts[NOTHING]:
        codes, kinds = codes[kinds != NOTHING], kinds[kinds != NOTHING]
    if counts[ALONE]:
        codes, kinds = _set_apart(codes, kinds)
    inside = np.zeros(len(kinds) + 2, bool)
    np.not_equal(kinds, APART, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    keep = inside[1:-1].copy()
    keep[ends[:-1]] = True  # one character between words
    codes = np.where(inside[1:-1], codes, np.uint32(SPACE))[keep]
    lengths = ends - starts
    ends = np.cumsum(lengths + 1) - 1
    return Words(codes, ends - lengths, ends, int(counts[LETTER] + counts[ALONE]))


def _set_apart(codes: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The characters with a space on either side of those that are words by themselves."""
    alone = kinds == ALONE
    places = np.cumsum(np.where(alone, 3, 1)) - 1 - alone
    length = len(codes) + 2 * int(alone.sum())
    wide, wide_kinds = np.full(length, SPACE, np.uint32), np.full(length, APART, np.uint8)
    wide[places], wide_kinds[places] = codes, np.where(alone, LETTER, kinds)
    return wide, wide_kinds
