"""The tokenizer artifact: a folder with ``tokenizer.json`` and a manifest that names its BOS and EOS."""

import functools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import (
    Manifest,
    atomic_folder,
    check_files,
    hash_file,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    import tokenizers

KIND, SCHEMA, FILE = "tokenizer", 1, "tokenizer.json"
BOS, EOS = "<s>", "</s>"
MIN_VOCAB_SIZE = 256 + 2
"""Every byte, BOS and EOS."""
WORDS = 1 << 16
"""Words whose tokens are kept."""


class Tokenizer:
    """Encodes text without adding special tokens; ``<s>`` or ``</s>`` written in a text stay plain characters."""

    def __init__(self, folder: Path, manifest: Manifest, backend: "tokenizers.Tokenizer") -> None:
        self.folder, self.manifest, self.backend = Path(folder), manifest, backend
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        self.hash = manifest.hash
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self.bos_id = self._special("bos")
        self.eos_id = self._special("eos")
        self.encode_word = functools.lru_cache(WORDS)(self.encode)
        """:meth:`encode` for short texts that come again and again; not to be changed."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a tokenizer folder, checking its files against the manifest.

        Raises:
            ArtifactError: not a tokenizer folder, or a damaged one.
        """
        import tokenizers

        manifest = read_manifest(Path(folder), KIND, SCHEMA)
        check_files(Path(folder), manifest, checksums=True)
        return cls(Path(folder), manifest, tokenizers.Tokenizer.from_file(str(Path(folder) / FILE)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.load, (self.folder,)

    def _special(self, role: str) -> int:
        token = self.manifest.settings.get(role, "")
        found = self.backend.token_to_id(token)
        if found is None:
            raise ArtifactError(f"{self.folder}: the {role} token {token!r} is not in {FILE}; make the tokenizer again")
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` for many texts, on all threads."""
        return [list(one.ids) for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encodings(self, texts: Sequence[str]) -> "list[tokenizers.Encoding]":
        """``ids`` of many texts, and ``offsets``: the first and the one-past-last character of each token."""
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    @functools.cached_property
    def splits_at_blanks(self) -> bool:
        """Whether it is known that words are tokenized one by one, by GPT-2's rules.

        A word of letters then has the blank before it, if that is a space, and ends before the next blank; what comes
        after does not change its tokens. False where the rules are others.
        """
        from tokenizers.models import BPE

        rules, model = self.backend.pre_tokenizer, self.backend.model
        steps = json.loads(rules.__getstate__()) if rules else {}
        *before, last = steps.get("pretokenizers", [steps])
        return (
            last.get("type") == "ByteLevel" and last["use_regex"] and not last["add_prefix_space"]
            and all(step["type"] == "Digits" for step in before)
            and isinstance(model, BPE) and not model.dropout and self.backend.normalizer is None
            and all(token.special for token in self.backend.get_added_tokens_decoder().values())
        )

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """For each token of ``text``, the first and the one-past-last of its characters."""
        return list(self.backend.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self.backend.decode([int(one) for one in ids], skip_special_tokens=True))

    def prefix_ids(self, text: str) -> list[int]:
        """BOS and the tokens of ``text``: the prefix before references and context."""
        return [self.bos_id, *self.encode(text)]

    def save(self, folder: str | Path) -> None:
        """Copy the artifact to ``folder``; the copy has the same hash."""
        with atomic_folder(Path(folder)) as temporary:
            for name in self.manifest.files:
                shutil.copyfile(self.folder / name, temporary / name)
            write_manifest(temporary, self.manifest)


def settings(vocab_size: int) -> dict[str, Any]:
    """Settings in the manifest of a tokenizer trained for ``vocab_size`` tokens."""
    return {"bos": BOS, "eos": EOS, "vocab_size": vocab_size}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path, *, inputs: dict[str, str] | None = None
) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``texts`` and write it to ``folder``; same texts, same bytes.

    ``inputs`` are hashes for the manifest of what the texts were read from. A small corpus may give fewer than
    ``vocab_size`` tokens.

    Raises:
        ConfigError: ``vocab_size`` below the 258 of all bytes, BOS and EOS.
        ArtifactError: ``folder`` exists already.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size={vocab_size}: must be at least {MIN_VOCAB_SIZE} (all bytes, BOS and EOS)")
    with atomic_folder(Path(folder)) as temporary:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        (temporary / FILE).write_text(backend.to_str(pretty=True), encoding="utf-8")
        manifest = Manifest(
            kind=KIND,
            schema=SCHEMA,
            inputs=inputs or {},
            settings=settings(vocab_size),
            files={FILE: hash_file(temporary / FILE)},
            info={"tokens": backend.get_vocab_size()},
        )
        write_manifest(temporary, manifest)
    return Tokenizer.load(folder)
