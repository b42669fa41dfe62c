"""How many tokens an entry takes, and which entries stand together in a long reference."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from data_tools.wordnet import Entry

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer

LOOK_AHEAD = 16
"""Entries that a reference is filled from."""


class Costs(NamedTuple):
    """Tokens of an entry's line, line end included."""

    stated: int
    """In a reference."""
    asked: int
    """In a document."""


class Reference(NamedTuple):
    """A piece of the knowledge base."""

    id: str
    entries: tuple[Entry, ...]

    @property
    def text(self) -> str:
        """One line for each entry."""
        return "\n".join(entry.line for entry in self.entries)


def count_tokens(entries: Sequence[Entry], tokenizer: "Tokenizer") -> dict[str, Costs]:
    """What each entry costs, by its id."""
    stated = tokenizer.encode_batch([f"{entry.line}\n" for entry in entries])
    asked = tokenizer.encode_batch([f"{entry.sentence}\n" for entry in entries])
    return {one.id: Costs(len(a), len(b)) for one, a, b in zip(entries, stated, asked, strict=True)}


def pack(entries: Iterable[Entry], costs: dict[str, Costs], least: int, most: int) -> Iterator[tuple[Entry, ...]]:
    """The entries in about their order, no word twice together, in groups of ``least`` to ``most`` tokens.

    What is left at last and fills no group is left out.
    """
    waiting = deque(entries)
    while waiting:
        group: list[Entry] = []
        later: list[Entry] = []
        tokens = -1  # the last line has no line end
        while waiting and len(later) < LOOK_AHEAD and tokens < least:
            entry = waiting.popleft()
            grown = tokens + costs[entry.id].stated
            words = {one.word.casefold() for one in group}
            if grown <= most and entry.word.casefold() not in words:
                group.append(entry)
                tokens = grown
            else:
                later.append(entry)
        waiting.extendleft(reversed(later))
        if tokens >= least:
            yield tuple(group)
