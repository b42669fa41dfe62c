"""Which words a text mentions, and which entries can be held out because nothing else mentions theirs."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from data_tools.wordnet import SHORTEST_HELDOUT, Entry

WORD = re.compile(r"\w+")

type Phrase = tuple[str, ...]


def phrase(text: str) -> Phrase:
    """The words of a text, letters' case and all else left out."""
    return tuple(WORD.findall(text.casefold()))


class Mentions:
    """Finds phrases in texts, as whole words in a row."""

    def __init__(self, phrases: Iterable[Phrase]) -> None:
        self.phrases = frozenset(phrases)
        self._longest = max(map(len, self.phrases), default=0)

    def find(self, text: str) -> set[Phrase]:
        """The phrases that ``text`` has."""
        words = phrase(text)
        return {
            part
            for first in range(len(words))
            for last in range(first + 1, min(first + self._longest, len(words)) + 1)
            if (part := words[first:last]) in self.phrases
        }

    def find_entry(self, entry: Entry) -> set[Phrase]:
        """The phrases that an entry's line in a reference or in a document has."""
        return self.find(entry.line) | self.find(entry.sentence)


def clear_entries(entries: Sequence[Entry]) -> list[Entry]:
    """The entries whose word no other entry has or mentions, whose gloss no other one has, and which say enough."""
    words = Mentions(phrase(entry.word) for entry in entries)
    mentioning = Counter(part for entry in entries for part in words.find_entry(entry))
    glosses = Counter(phrase(entry.gloss) for entry in entries)
    return [
        entry
        for entry in entries
        if phrase(entry.word)
        and mentioning[phrase(entry.word)] == glosses[phrase(entry.gloss)] == 1
        and len(entry.gloss) >= SHORTEST_HELDOUT
    ]
