"""Rules by which a document is kept or dropped, from counts of its words alone (the paper's section 6.1).

The paper gives three thresholds and calls two only "exceptionally high" and "excessively low"; ours for those are
choices, as is what a word is (data_tools/words.py). Unique words and entropy are counted as RedPajama-V2 does.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from data_tools.words import Words
from megatron_m3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Thresholds; a document on the wrong side of one is dropped."""

    min_words: int = 50
    """Fewest words."""
    max_word_length: float = 10.0
    """Greatest mean length of its words, in characters."""
    max_non_alphabetic: float = 0.7
    """Greatest share of characters that are no letters; spaces count as such."""
    max_unique_words: float = 0.95
    """Greatest share of distinct words among its words."""
    min_entropy: float = 2.5
    """Least entropy of the frequencies of its words, in nats."""

    def __post_init__(self) -> None:
        for name in ("max_non_alphabetic", "max_unique_words"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rules.{name}={getattr(self, name)}: a share, must be from 0 to 1")
        for name in ("min_words", "max_word_length", "min_entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"rules.{name}={getattr(self, name)}: must be a number that is not negative")

    def broken_by(self, words: Words) -> list[tuple[str, float] | None]:
        """For each text the first rule that it breaks, and its value; None if it keeps all."""
        counts = words.counts
        some = np.maximum(counts, 1)
        lengths = np.append(0, np.cumsum(words.ends - words.starts))[words.firsts]
        unique, entropy = _unique_words_and_entropy(words)
        checks = (
            ("too few words", counts, counts < max(1, self.min_words)),
            ("words too long", length := np.diff(lengths) / some, length > self.max_word_length),
            ("too few letters", other := 1 - words.letters / np.maximum(words.characters, 1),
             other > self.max_non_alphabetic),
            ("too many unique words", share := unique / some, share > self.max_unique_words),
            ("too little entropy", entropy, entropy < self.min_entropy),
        )
        found: list[tuple[str, float] | None] = [None] * len(counts)
        for reason, values, broken in reversed(checks):
            for text in np.flatnonzero(broken):
                found[text] = reason, values[text].item()
        return found


def _unique_words_and_entropy(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """Distinct words of each text, and the entropy of the frequencies of its words in nats (0 where it has none)."""
    hashes, firsts = words.hashes()
    for first, last in itertools.pairwise(firsts.tolist()):
        hashes[first:last].sort()
    begins = np.ones(len(hashes) + 1, bool)
    begins[1:-1] = hashes[1:] != hashes[:-1]
    begins[firsts] = True
    edges = np.flatnonzero(begins)
    times = np.diff(edges)
    text = np.repeat(np.arange(len(firsts) - 1), words.counts)[edges[:-1]]
    unique, counts = np.bincount(text, minlength=len(firsts) - 1), np.maximum(words.counts, 1)
    return unique, np.log(counts) - np.bincount(text, times * np.log(times), len(firsts) - 1) / counts
