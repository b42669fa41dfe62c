"""Entries that are held out: those whose words nothing else mentions; and the lines that ask for them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from data_tools.packing import Costs, Reference, pack
from data_tools.wordnet import SHORTEST_HELDOUT, Entry, hash_order
from megatron_m3.errors import ConfigError

WORD = re.compile(r"\w+")
HELDOUT_ENTRIES = range(5, 8)
"""Entries in a held-out long reference."""
BESIDE = 4
"""Other long references beside the right one."""

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


def choose_heldout(
    entries: Sequence[Entry], costs: dict[str, Costs], count: int, seed: int, least: int, most: int
) -> list[tuple[Entry, ...]]:
    """Entries to hold out, as they stand together in ``count`` long references of ``least`` to ``most`` tokens.

    Raises:
        ConfigError: fewer can be.
    """
    clear = sorted(clear_entries(entries), key=lambda entry: hash_order(entry, f"{seed} held out"))
    packed = pack(clear[: 16 * count], costs, least, most)
    groups = [group for group in packed if len(group) in HELDOUT_ENTRIES][:count]
    if len(groups) < count:
        raise ConfigError(f"heldout, calibration: {count} together, but only {len(groups)} can be; ask for fewer")
    return groups


def score_lines(groups: Sequence[tuple[Entry, ...]]) -> dict[str, list[dict[str, Any]]]:
    """Lines to score, one for each group, with short, long and five references."""
    texts = [Reference("", group).text for group in groups]
    lines: dict[str, list[dict[str, Any]]] = {"short": [], "long": [], "five": []}
    for number, group in enumerate(groups):
        entry = min(group, key=lambda entry: hash_order(entry, "asked"))
        others = [texts[(number + step) % len(texts)] for step in range(1, BESIDE + 1)]
        others.insert(number % (BESIDE + 1), texts[number])
        line = {"id": entry.id, "context": entry.opening, "target": f" {entry.gloss}"}
        lines["short"].append(line | {"references": [entry.line]})
        lines["long"].append(line | {"references": [texts[number]]})
        lines["five"].append(line | {"references": others})
    return lines
