"""Text that is written while its tokens come, up to the first stop text."""

from collections.abc import Sequence

from megatron_m3.tokenizer import Tokenizer

HALF = "\ufffd"
"""What bytes become that are no whole character, or not yet."""


class Writer:
    """Turns tokens into pieces of text; joined, these are what the tokens decode to at once, up to a stop text.

    Bytes that are no UTF-8 may become other replacement characters than at once.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        """Whether a stop text came; it and what follows are left out."""
        self._tokens: list[int] = []
        """The last that are text already, for what depends on them, and those that are none yet."""
        self._written = 0
        """How many of these are text."""
        self._text = ""
        self._given = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The piece that further tokens add. Half a character waits for its rest, and so does half a stop text."""
        self._tokens += tokens
        added = self._unwritten()
        if added and not added.endswith(HALF):
            self._tokens, self._written = self._tokens[self._written :], len(self._tokens) - self._written
            self._add(added)
        return self._give(len(self._text) - self._held())

    def finish(self) -> str:
        """The last piece."""
        self._add(self._unwritten())
        return self._give(len(self._text))

    def _unwritten(self) -> str:
        """What the last tokens add to the text."""
        before = self.tokenizer.decode(self._tokens[: self._written])
        return self.tokenizer.decode(self._tokens)[len(before) :]

    def _add(self, added: str) -> None:
        if self.stopped:
            return
        before = len(self._text)
        self._text += added
        places = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop]
        if found := [place for place in places if place >= 0]:
            self._text, self.stopped = self._text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop text begins."""
        if self.stopped:
            return 0
        return max((length for stop in self.stop for length in range(1, len(stop))
                    if self._text.endswith(stop[:length])), default=0)

    def _give(self, end: int) -> str:
        piece, self._given = self._text[self._given : end], max(end, self._given)
        return piece
