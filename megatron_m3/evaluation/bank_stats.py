"""What a bank holds: bytes by part, edits, and of a sample which tokens are kept, where, and how long they are.

Letters: N references, L memory layers, X key or value, G key-value heads, K kept tokens, T tokens of a reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_m3.memory.bank import CODEC, MemoryBank
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.platform.progress import Progress
from megatron_m3.references import ReferenceStore

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer

BINS = 16
"""Parts of a reference in which kept tokens are counted."""
BATCH = 256
SHOWN = 20
"""Tokens that are listed."""
KINDS = ("start of a word", "inside a word", "number", "punctuation", "space")


@dataclass(frozen=True, kw_only=True)
class KeptToken:
    """A token of the vocabulary."""

    text: str
    kept: int
    """Times that a head of a layer kept it, in the sample."""
    kept_share: float
    """Of all that is kept."""
    text_share: float
    """Of all tokens of the sample's references."""


@dataclass(frozen=True, kw_only=True)
class BankStats:
    """See the module."""

    references: int
    parts: dict[str, int]
    """Bytes on disk, by part."""
    edits: int
    """Edits that were not folded into shards yet."""
    edited: int
    """References whose records stand outside the shards."""
    deleted: int
    """References deleted since the bank was built, or compacted."""
    sample: int
    """References that all below is measured on."""
    empty: int
    """Of these, without a token."""
    kept_tokens: dict[int, int]
    """How many references keep how many tokens."""
    relative_to_length: bool
    """Whether places are shares of each reference's own length; else of the longest one's."""
    places: list[list[float]]
    """By layer: share of its kept tokens in each of ``BINS`` equal parts of a reference."""
    layers: tuple[int, ...]
    key_norms: list[list[float | None]]
    """By layer and head: mean length of a kept key as it is read; None where a head holds no memory."""
    value_norms: list[list[float | None]]
    kinds: dict[str, tuple[float, float]]
    """Of each kind of token, its share of what is kept and of the text; empty without tokenizer."""
    tokens: list[KeptToken]
    """The tokens kept most often; none without tokenizer."""

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(self.parts.values())


def measure_bank(
    bank: MemoryBank, ids: np.ndarray, references: ReferenceStore | None = None, tokenizer: "Tokenizer | None" = None
) -> BankStats:
    """Statistics of a bank.

    Args:
        bank: the bank.
        ids: references that are read.
        references: the bank's knowledge base; without, places are not relative to each reference's length.
        tokenizer: the bank's; with it, and the references, tokens are told.
    """
    tally = _Tally(bank)
    with Progress("stats", len(ids), "references") as progress:
        for first in range(0, len(ids), BATCH):
            some = ids[first : first + BATCH]
            tally.add(bank.read(some), *(references.tokens(some) if references else (None, None)))
            progress.advance(len(some))
    kinds, tokens = tally.told(tokenizer.decode) if tokenizer and references else ({}, [])
    keys, values = tally.norms()
    return BankStats(
        references=len(bank), parts=count_bytes(bank), edits=len(bank.places.edits.folders),
        edited=len(bank.places.ids), deleted=len(bank.places.deleted), sample=len(ids),
        empty=tally.num_kept.get(0, 0), kept_tokens=dict(sorted(tally.num_kept.items())),
        relative_to_length=references is not None, layers=bank.settings.memory_layers, key_norms=keys,
        value_norms=values, kinds=kinds, tokens=tokens,
        places=(tally.places / tally.places.sum(1, keepdims=True).clip(1)).round(5).tolist(),
    )


def count_bytes(bank: MemoryBank) -> dict[str, int]:
    """Bytes of the bank on disk by part; records that count no more are a part of their own."""
    record, lists = bank.record, int(bank.record.held_LG.sum())
    files = {name: int(entry["bytes"]) for name, entry in bank.manifest.files.items()}
    codec = sum(size for name, size in files.items() if name.startswith(f"{CODEC}/"))
    written = sum(files.values()) - codec
    alive = len(bank) - len(bank.places.deleted)
    positions = 2 * lists * record.num_kept_tokens
    return {
        "codes": alive * record.codes_bytes, "positions": alive * positions,
        "counts and checksums": alive * (record.record_bytes - record.codes_bytes - positions),
        "replaced and deleted records": written - alive * record.record_bytes, "codec": codec,
    }


class _Tally:
    """Sums over the memories that were added."""

    def __init__(self, bank: MemoryBank) -> None:
        self.held_LG, self.longest = bank.settings.memory_lists, bank.settings.reference_length
        self.num_kept: dict[int, int] = {}
        self.places = np.zeros((len(self.held_LG), BINS), np.int64)
        self._lengths_LXG = torch.zeros(len(self.held_LG), 2, self.held_LG.shape[1], dtype=torch.float64)
        self._count = 0
        self._kept, self._text = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, memories: ExplicitMemories, tokens_NT: np.ndarray | None, lengths_N: np.ndarray | None) -> None:
        for kept, count in zip(*np.unique(memories.num_kept.numpy(), return_counts=True), strict=True):
            self.num_kept[int(kept)] = self.num_kept.get(int(kept), 0) + int(count)
        valid_NK = memories.valid_slots()
        norms_NLXGK = memories.kv.norm(dim=-1).double() * valid_NK[:, None, None, None]
        self._lengths_LXG += norms_NLXGK.sum((0, 4))
        self._count += int(valid_NK.sum())
        places_NLGK = memories.positions.long()
        length = torch.tensor(self.longest) if lengths_N is None else torch.from_numpy(lengths_N.clip(1))
        bins_NLGK = (places_NLGK * BINS // length.view(-1, 1, 1, 1)).clamp(max=BINS - 1)
        counted_NLGK = valid_NK[:, None, None] & self.held_LG[None, :, :, None]
        for layer in range(len(self.held_LG)):
            self.places[layer] += np.bincount(bins_NLGK[:, layer][counted_NLGK[:, layer]].numpy(), minlength=BINS)
        if tokens_NT is not None and lengths_N is not None:
            rows_NLGK = torch.arange(len(tokens_NT)).view(-1, 1, 1, 1).expand_as(places_NLGK)
            kept = tokens_NT[rows_NLGK[counted_NLGK].numpy(), places_NLGK[counted_NLGK].numpy()]
            self._kept = _add_counts(self._kept, kept)
            self._text = _add_counts(self._text, tokens_NT[np.arange(tokens_NT.shape[1]) < lengths_N[:, None]])

    def norms(self) -> tuple[list[list[float | None]], list[list[float | None]]]:
        """Mean length of keys and of values, by layer and head."""
        mean_LXG = self._lengths_LXG / max(1, self._count)
        held = self.held_LG.tolist()
        keys, values = ([[round(norm, 4) if is_held else None for norm, is_held in zip(row, flags, strict=True)]
                         for row, flags in zip(mean_LXG[:, part].tolist(), held, strict=True)] for part in (0, 1))
        return keys, values

    def told(
        self, decode: Callable[[list[int]], str]
    ) -> tuple[dict[str, tuple[float, float]], list[KeptToken]]:
        """Shares of the kinds of tokens, and the tokens kept most often."""
        size = max(len(self._kept), len(self._text))
        kept, text = (np.pad(counts, (0, size - len(counts))) for counts in (self._kept, self._text))
        kept_all, text_all = max(1, kept.sum()), max(1, text.sum())
        shares = dict.fromkeys(KINDS, (0.0, 0.0))
        for id in np.flatnonzero(text).tolist():
            kind = kind_of(decode([id]))
            before = shares[kind]
            shares[kind] = (before[0] + kept[id] / kept_all, before[1] + text[id] / text_all)
        most = [id for id in np.argsort(-kept, kind="stable")[:SHOWN].tolist() if kept[id]]
        return ({kind: (round(float(one), 5), round(float(two), 5)) for kind, (one, two) in shares.items()},
                [KeptToken(text=decode([id]), kept=int(kept[id]), kept_share=float(kept[id] / kept_all),
                           text_share=float(text[id] / text_all)) for id in most])


def _add_counts(counts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    more = np.bincount(ids.ravel(), minlength=len(counts))
    more[: len(counts)] += counts
    return more


def kind_of(text: str) -> str:
    """One of :data:`KINDS`, from the text of a token."""
    word = text.strip()
    if not word:
        return "space"
    if any(character.isdigit() for character in word):
        return "number"
    if any(character.isalpha() for character in word) or not word.isprintable() or "\ufffd" in word:
        return "start of a word" if text[:1].isspace() else "inside a word"
    return "punctuation"
