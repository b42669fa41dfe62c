"""Edits of a knowledge base: what a store added, replaced and deleted since the one that it was made from.

Ids are stable for ever: an added reference gets the next free id, a deleted one stays as a reference of no tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from megatron_m3.errors import ConfigError, DataError

RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit of a knowledge base; ids are written as in ``3,7,20-40``."""

    base: str
    """Hash of the store before."""
    added: str = ""
    """New ids, at the end."""
    replaced: str = ""
    """Ids whose text is another."""
    deleted: str = ""
    """Ids that have no tokens any more."""
    appended: str = ""
    """Hash of the store whose references were added, in order; empty where they were cut from texts."""

    def to_dict(self) -> dict[str, str]:
        """As a manifest has it."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Back from a manifest."""
        return cls(**fields)

    @property
    def ids(self) -> np.ndarray:
        """All ids that it touches, ascending."""
        return parse_ids(",".join(filter(None, (self.added, self.replaced, self.deleted))))


def parse_ids(text: str, name: str = "ids", below: int = 1 << 31) -> np.ndarray:
    """The ids of ``3,7,20-40``, int64, distinct and ascending; none of an empty text.

    Raises:
        ConfigError: not such a list; ``name`` is the field it stands in.
        DataError: an id is not under ``below``.
    """
    parts = []
    for word in filter(None, text.replace(" ", "").split(",")):
        found = RANGE.fullmatch(word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ConfigError(f"{name}={word[:80]}: not an id or a range of ids; write them as 3,7,20-40")
        if last >= below:
            raise DataError(f"{name}={word}: there is no reference {last}, ids are 0-{below - 1}")
        parts.append(np.arange(first, last + 1, dtype=np.int64))
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def format_ids(ids: np.ndarray | Sequence[int] | range) -> str:
    """Ascending distinct ids as :func:`parse_ids` reads them."""
    ids = np.asarray(ids, np.int64)
    ends = np.flatnonzero(np.diff(ids) != 1)
    firsts, lasts = ids[np.r_[0, ends + 1]] if len(ids) else ids, ids[np.r_[ends, -1]] if len(ids) else ids
    return ",".join(str(first) if first == last else f"{first}-{last}"
                    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True))
