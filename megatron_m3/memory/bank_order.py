"""What bank is to be built: its inputs, opened and checked, and all that follows from them and the options."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_m3.config import replace_fields
from megatron_m3.config.bank import BankConfig
from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.manifest import read_manifest
from megatron_m3.memory.bank import CODEC, KIND, SCHEMA, BankSettings, head_list
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import SampleSize, check_codec, load_codec, resolve_codec, token_bytes
from megatron_m3.memory.encode import LateMemories, start_encoding
from megatron_m3.memory.sensitivity import Sensitivity, measure_sensitivity
from megatron_m3.memory.types import ExplicitMemories, held_lists
from megatron_m3.model.checkpoint import LoadedModel, ModelDescription
from megatron_m3.references import ReferenceStore


@dataclass(frozen=True, kw_only=True)
class BankOrder[Model: ModelDescription]:
    """One bank to be built: its inputs, opened and checked."""

    options: BankConfig
    loaded: Model
    references: ReferenceStore

    @classmethod
    def open(cls, options: BankConfig, load: Callable[[Path], Model]) -> Self:
        """Read the model and the references, and check that they and the codec go together.

        Raises:
            M3Error: they do not, or one of them cannot be read.
        """
        references = ReferenceStore.open(options.references)
        loaded = load(Path(options.checkpoint))
        if references.tokenizer_hash != loaded.tokenizer.hash:
            raise ArtifactError(f"{options.references}: made with another tokenizer than {options.checkpoint} "
                                f"({references.tokenizer_hash[:12]}, not {loaded.tokenizer.hash[:12]}); make the "
                                "references again with the checkpoint's")
        if not len(references):
            raise DataError(f"{options.references}: holds no reference")
        given = {"memory.layers": options.memory_layers, "memory.heads": options.memory_heads,
                 "memory.tokens": options.memory_tokens}
        config = replace_fields(loaded.config, {name: text for name, text in given.items() if text is not None})
        if references.reference_length > config.memory.reference_length:
            raise ConfigError(f"{options.references}: references of up to {references.reference_length} tokens, the "
                              f"checkpoint was trained with {config.memory.reference_length}; make them again with "
                              f"--reference-length {config.memory.reference_length}")
        check_codec(options.codec, config.model.head_size)
        return cls(options=options, loaded=replace(loaded, config=config), references=references)

    @property
    def folder(self) -> Path:
        """Where the bank will lie."""
        return Path(self.options.output)

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of what the bank is made from."""
        return {"checkpoint": self.loaded.weights_hash, "tokenizer": self.loaded.tokenizer.hash,
                "references": self.references.hash}

    @property
    def memory_heads(self) -> str:
        """The heads that hold memory, as the bank will say."""
        return head_list(self.loaded.config.memory_heads, self.loaded.config.model.num_kv_heads)

    @property
    def memory_lists(self) -> Tensor:
        """Which heads hold memory in which memory layers, bool [L, G]."""
        return held_lists(self.loaded.config.memory_heads, self.loaded.config.model.num_kv_heads)

    @property
    def key(self) -> dict[str, Any]:
        """All that decides the bank's bytes, as JSON values."""
        options, config = self.options, self.loaded.config
        names = ("codec", "codec_sample", "codec_shared", "seed", "block_size", "batch_tokens")
        shape = {"layers": config.memory_layers, "tokens": config.memory.num_kept_tokens,
                 "selection": config.memory.selection, "spread": config.memory.spread, "prefix": config.memory.prefix,
                 "dtype": config.training.dtype}
        shape |= {"heads": self.memory_heads} if self.memory_heads != "all" else {}
        shape |= {"codec_from": self.given_codec[2]} if self.given_codec else {}
        shape |= {"tensor_parallel": options.tensor_parallel} if options.tensor_parallel > 1 else {}
        return {"kind": KIND, "schema": SCHEMA, "inputs": self.inputs,
                "settings": shape | {name: getattr(options, name) for name in names}}

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each reference, int32 [N]; unchecked."""
        return self.references.lengths()

    def planned_settings(self) -> BankSettings:
        """The settings that the bank will have, known before the codec is trained.

        Raises:
            ConfigError: the sample is too small for the codec.
        """
        config, ids = self.loaded.config, self.sample_ids()
        if self.given_codec:
            return self.settings(self.given_codec[1].name, self.given_codec[1].token_bytes)
        head_size = config.model.head_size
        kept = np.minimum(self.lengths[ids], config.memory.num_kept_tokens).sum()
        name = resolve_codec(self.options.codec, head_size, SampleSize(
            references=len(ids), kept_tokens=int(kept), num_lists=int(self.memory_lists.sum())))
        return self.settings(name, token_bytes(name, head_size, config.training.dtype))

    def settings(self, codec: str, token_bytes: int) -> BankSettings:
        """The settings that the bank will say of itself."""
        return BankSettings.of(self.loaded.config, num_references=len(self.references),
                               block_size=self.options.block_size, codec=codec, token_bytes=token_bytes)

    def sample_ids(self) -> np.ndarray:
        """References with tokens, drawn uniformly, that the codec is trained on; none where none is trained."""
        alive = np.flatnonzero(self.lengths)
        trains = self.options.codec != "none" and not self.options.codec_from
        count = min(self.options.codec_sample, len(alive)) if trains else 0
        return np.sort(np.random.default_rng(self.options.seed).choice(alive, count, replace=False))

    @functools.cached_property
    def given_codec(self) -> tuple[Path, Codec, str] | None:
        """Folder, codec and its hash, where another bank's is taken.

        Raises:
            ArtifactError: it does not suit this bank's memories.
        """
        if not self.options.codec_from:
            return None
        folder = Path(self.options.codec_from)
        other = BankSettings.from_dict(read_manifest(folder, KIND, SCHEMA).settings)
        if other.head_size != self.loaded.config.model.head_size or not torch.equal(other.memory_lists,
                                                                                    self.memory_lists):
            raise ArtifactError(f"codec_from={folder}: its memories are of other layers, heads or head size than these")
        return folder / CODEC, *load_codec(folder / CODEC, self.memory_lists)


class BankJob(BankOrder[LoadedModel]):
    """A bank that this process can help to build: it has the weights."""

    def sensitivity(self) -> Sensitivity:
        """What readers notice, by the sample's references."""
        tokens, lengths = self.references.tokens(self.sample_ids())
        return measure_sensitivity(self.loaded, [row[:length] for row, length in zip(tokens, lengths, strict=True)])

    def encode(self, ids: np.ndarray | range) -> ExplicitMemories:
        """Memories of some references."""
        return self.start(*self.references.tokens(np.asarray(ids))).collect()

    def start(self, tokens: np.ndarray, lengths: np.ndarray) -> LateMemories:
        """Memories of references, given by their tokens, that the device may still be busy with."""
        return start_encoding(self.loaded, tokens, lengths, [self.loaded.config],
                              batch_tokens=self.options.batch_tokens)[0]
