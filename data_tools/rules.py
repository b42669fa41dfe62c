"""Rules by which a document is kept or dropped, from counts of its words alone (the paper's section 6.1).

The paper gives three thresholds and calls two only "exceptionally high" and "excessively low"; ours for those are
choices, as is what a word is (data_tools/words.py). Unique words and entropy are counted as RedPajama-V2 does.
"""

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
            if getattr(self, name) < 0:
                raise ConfigError(f"rules.{name}={getattr(self, name)}: must not be negative")

    def broken_by(self, words: Words, characters: int) -> tuple[str, float] | None:
        """The first rule that a document of ``characters`` characters breaks, and its value; None if it keeps all."""
        count = len(words.starts)
        if count < max(1, self.min_words):
            return "too few words", count
        length = float((words.ends - words.starts).mean())
        if length > self.max_word_length:
            return "words too long", length
        other = 1 - words.letters / characters
        if other > self.max_non_alphabetic:
            return "too few letters", other
        ordered = np.sort(words.hashes())
        edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        times = np.diff(edges, prepend=0, append=count)
        unique = len(times) / count
        if unique > self.max_unique_words:
            return "too many unique words", unique
        entropy = float(np.log(count) - (times * np.log(times)).sum() / count)
        if entropy < self.min_entropy:
            return "too little entropy", entropy
        return None
