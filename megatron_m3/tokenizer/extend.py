"""A second language for a BPE tokenizer: its characters and their commonest sequences, after all that the base has.

The tokens and merges of the base keep their places, and every new merge ranks below them and begins with a character of
the second language. So a text without such characters is encoded to the same ids as before. New tokens are learnt over
the pieces into which the base cuts the second language's characters, so each can be reached.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import regex

from megatron_m3.errors import ConfigError, UnsupportedError
from megatron_m3.manifest import Manifest, atomic_folder, hash_file, write_manifest
from megatron_m3.tokenizer.tokenizer import FILE, KIND, SCHEMA, Tokenizer

HAN = r"\p{Han}\u3000-\u303f\uff00-\uffef"
"""Chinese characters, CJK punctuation, fullwidth forms; the inside of a regular expression's brackets."""
STAND_IN = 0xF0000
"""Private code points from here on stand for the characters' tokens while new merges are learnt."""


def settings_of_extension(base: Tokenizer, vocab_size: int, characters: str) -> dict[str, Any]:
    """Settings in the manifest of an extended tokenizer."""
    kept = {name: value for name, value in base.manifest.settings.items() if name in ("bos", "eos")}
    return kept | {"vocab_size": vocab_size, "characters": characters}


def extend_tokenizer(
    base: Tokenizer, texts: Iterable[str], vocab_size: int, folder: str | Path, *, characters: str = HAN,
    inputs: dict[str, str] | None = None
) -> Tokenizer:
    """Write ``base`` with up to ``vocab_size`` tokens, the new ones learnt from ``texts``, to ``folder``.

    Args:
        base: a BPE tokenizer, byte-level or with byte fallback.
        texts: of the second language; only their runs of ``characters`` are learnt from.
        vocab_size: tokens in all; few texts may give fewer.
        folder: to write.
        characters: of the second language, as the inside of a regular expression's brackets.
        inputs: hashes for the manifest of what the texts were read from.

    Raises:
        ConfigError: ``vocab_size`` leaves nothing to add, or no text has such characters.
        UnsupportedError: the base is no such tokenizer.
        ArtifactError: ``folder`` exists already.
    """
    model = json.loads((base.folder / FILE).read_text(encoding="utf-8"))
    _check_model(model, base.folder)
    if vocab_size <= base.vocab_size:
        raise ConfigError(f"vocab_size={vocab_size}: the base has {base.vocab_size} tokens already; give more")
    runs = Counter(_find_runs(base, texts, _pattern(characters)))
    counts = Counter[str]()
    for run, times in runs.items():
        for character in run:
            counts[character] += times
    if not counts:
        raise ConfigError(f"characters={characters}: none of them in the texts; give texts of the second language")
    growth = _Growth(base, model["model"], vocab_size)
    by_count = sorted(counts, key=lambda character: (-counts[character], character))
    known = [character for character in by_count if growth.add_character(character)]
    growth.learn(runs, known)
    with atomic_folder(Path(folder)) as temporary:
        for name in base.manifest.files:
            (temporary / name).write_bytes((base.folder / name).read_bytes())
        (temporary / FILE).write_text(json.dumps(model, ensure_ascii=False, indent=2), encoding="utf-8")
        write_manifest(temporary, Manifest(
            kind=KIND, schema=SCHEMA, inputs={"base": base.hash} | (inputs or {}),
            settings=settings_of_extension(base, vocab_size, characters),
            files={name: hash_file(temporary / name) for name in base.manifest.files},
            info={"tokens": growth.next_id, "base_tokens": base.vocab_size, "characters": len(known)},
        ))
    return Tokenizer.load(folder)


def _check_model(file: dict[str, Any], folder: Path) -> None:
    kind, byte_fallback = file["model"].get("type"), file["model"].get("byte_fallback")
    if kind != "BPE" or not (byte_fallback or '"ByteLevel"' in json.dumps(file.get("decoder"))):
        raise UnsupportedError(f"{folder}: a tokenizer of type {kind}; only BPE over bytes, or with byte fallback, can "
                               "be extended")


def _byte_characters() -> str:
    """The character by which byte-level BPE writes each of the 256 bytes, in order of bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in plain else next(others)) for byte in range(256))


def _pattern(characters: str) -> "regex.Pattern[str]":
    try:
        return regex.compile(f"[{characters}]+")
    except regex.error as error:
        raise ConfigError(f"characters={characters}: {error}; give what stands between [ and ]") from None


def _find_runs(base: Tokenizer, texts: Iterable[str], pattern: "regex.Pattern[str]") -> Iterator[str]:
    """The runs of the second language's characters; none crosses what the base takes apart before encoding."""
    split = base.backend.pre_tokenizer
    for text in texts:
        for run in pattern.finditer(text):
            if split is None:
                yield run.group()
            else:
                yield from (run.group()[first:last] for _, (first, last) in split.pre_tokenize_str(run.group()))


class _Growth:
    """The vocabulary and merges of a model of tokenizer.json, growing up to ``vocab_size``."""

    def __init__(self, base: Tokenizer, model: dict[str, Any], vocab_size: int) -> None:
        self.base, self.vocab, self.merges, self.vocab_size = base, model["vocab"], model["merges"], vocab_size
        self.vocab.update(base.backend.get_vocab())  # tokens added after training have their numbers there too
        self.byte_fallback = bool(model.get("byte_fallback"))
        self.next_id = base.vocab_size
        self.tokens: dict[str, str] = {}
        """The token of each character."""
        self.bytes = _byte_characters()
        self.joined_by_space = bool(self.merges) and isinstance(self.merges[0], str)
        self.known_merges = {tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in self.merges}

    def add_character(self, character: str) -> bool:
        """See that a character is one token; false where the vocabulary has no room for it."""
        written = character if self.byte_fallback else "".join(self.bytes[byte] for byte in character.encode())
        found = [piece.value for piece in self.base.backend.model.tokenize(written)]
        if self.byte_fallback:
            found = [written]
        elif "".join(found) != written:  # the base lacks a byte
            found = list(written)
        pieces, heads = found, ["".join(found[: end + 1]) for end in range(len(found))]
        if self.next_id + len({*heads, *pieces} - self.vocab.keys()) > self.vocab_size:
            return False
        for piece in pieces:
            self._add_token(piece)
        for head, piece in zip(heads, pieces[1:], strict=False):
            self._add_merge(head, piece)
        self.tokens[character] = written
        return True

    def _add_token(self, token: str) -> None:
        if token not in self.vocab:
            self.vocab[token] = self.next_id
            self.next_id += 1

    def _add_merge(self, left: str, right: str) -> None:
        self._add_token(left + right)
        if (left, right) not in self.known_merges:
            self.known_merges.add((left, right))
            self.merges.append(f"{left} {right}" if self.joined_by_space else [left, right])

    def learn(self, runs: Counter[str], known: list[str]) -> None:
        """Add the commonest sequences of ``known`` characters in the runs until the vocabulary is full."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, trainers

        stand_ins = {character: chr(STAND_IN + number) for number, character in enumerate(known)}
        tokens = {stand_in: self.tokens[character] for character, stand_in in stand_ins.items()}
        sizes = {len(token) for token in tokens.values()}
        heads = set(tokens.values())
        in_base = sum(any(token[:size] in heads for size in sizes) for token in self.vocab)
        unknown = regex.compile(f"[^{''.join(map(regex.escape, stand_ins))}]+")
        table = str.maketrans(stand_ins)
        words = (part.translate(table) for run in runs.elements() for part in unknown.split(run) if len(part) > 1)
        backend = Backend(models.BPE())
        backend.train_from_iterator(words, trainers.BpeTrainer(
            vocab_size=len(known) + self.vocab_size - self.next_id + in_base, show_progress=False,
            initial_alphabet=list(tokens), special_tokens=[]))
        for left, right in json.loads(backend.to_str())["model"]["merges"]:
            if self.next_id == self.vocab_size:
                return
            self._add_merge(*("".join(tokens[one] for one in side) for side in (left, right)))
