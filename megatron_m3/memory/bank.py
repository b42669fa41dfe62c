"""The memory bank: the explicit memories of all references on disk, read by id (architecture: bank record).

A folder with ``shard_NNNNNN.bin`` (``block_size`` records each, see :mod:`megatron_m3.memory.record`), ``codec/`` and a
manifest that names the model, the tokenizer and the references by hash. Reference ``id`` is record ``id % block_size``
of shard ``id // block_size``, unless it was edited since the bank was built, see :mod:`megatron_m3.memory.edits`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from megatron_m3.config import Config, MemoryConfig
from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.manifest import BlockFolder, Manifest, check_files, check_input, read_manifest
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import load_codec
from megatron_m3.memory.edits import Edits, Places, shard_name
from megatron_m3.memory.record import RecordLayout
from megatron_m3.memory.storage import LocalStorage, Storage
from megatron_m3.memory.types import ExplicitMemories, held_lists

KIND, SCHEMA = "bank", 2
CODEC = "codec"


@dataclass(frozen=True, kw_only=True)
class BankSettings:
    """What shaped a bank; the settings of its manifest."""

    num_references: int
    block_size: int
    """References in a shard; the last may have fewer."""
    memory_layers: tuple[int, ...]
    num_kept_tokens: int
    selection: str
    spread: int
    prefix: str
    reference_length: int
    """Positions that a reference takes up."""
    num_kv_heads: int
    head_size: int
    codec: str
    """none, KLT and a number, or the codec's FAISS factory string."""
    token_bytes: int
    """Bytes of the key and the value of one kept token."""
    memory_heads: str = "all"
    """The heads that hold memory, as ``memory.heads``; the manifest of a bank of all heads leaves it out."""
    edits: Edits | None = None
    """What was edited since the bank was built; the manifest of one that was not leaves it out."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as a manifest has them."""
        return {name: value for name, value in asdict(self).items()
                if (name, value) not in (("memory_heads", "all"), ("edits", None))}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Back from a manifest."""
        edits = {"edits": Edits.from_dict(fields["edits"])} if "edits" in fields else {}
        return cls(**{**fields, "memory_layers": tuple(fields["memory_layers"])} | edits)

    @property
    def memory_lists(self) -> Tensor:
        """Which heads hold memory in which memory layers, bool [L, G]."""
        memory = MemoryConfig(layers=layer_list(self.memory_layers), heads=self.memory_heads)
        return held_lists(memory.memory_heads(self.memory_layers[-1] + 1, self.num_kv_heads), self.num_kv_heads)

    @property
    def record(self) -> RecordLayout:
        """Layout of a record."""
        return RecordLayout(held_LG=self.memory_lists, num_kept_tokens=self.num_kept_tokens,
                            token_bytes=self.token_bytes)

    @property
    def num_blocks(self) -> int:
        """Shards of the bank."""
        return -(-self.num_references // self.block_size)

    def block(self, index: int) -> range:
        """Reference ids of one shard."""
        return range(index * self.block_size, min((index + 1) * self.block_size, self.num_references))


def layer_list(layers: Sequence[int]) -> str:
    """Layers as ``memory.layers`` takes them."""
    return ",".join(map(str, layers))


def head_list(memory_heads: Mapping[int, Sequence[int]], num_kv_heads: int) -> str:
    """The heads of each memory layer as ``memory.heads`` takes them; always the same text for the same heads."""
    if all(len(heads) == num_kv_heads for heads in memory_heads.values()):
        return "all"
    return ";".join(f"{layer}:{','.join(map(str, heads))}" for layer, heads in memory_heads.items())


class ShardFolder(BlockFolder):
    """The shards of a bank that is being written."""

    def name(self, index: int) -> str:
        """File name of shard ``index``."""
        return shard_name(index)


class MemoryBank:
    """Reads explicit memories by reference id; ids run from 0 to ``len(bank) - 1``. Never writes."""

    def __init__(self, folder: Path, manifest: Manifest, settings: BankSettings, codec: Codec) -> None:
        self.folder, self.manifest, self.settings, self.codec = folder, manifest, settings, codec
        self.hash, self.record = manifest.hash, settings.record
        self.codec_name, self.record_bytes = settings.codec, settings.record.record_bytes
        self.storage: Storage = LocalStorage(folder)
        self.places = Places(folder, settings.num_references, settings.block_size, settings.edits, manifest.files)

    @classmethod
    def open(
        cls, folder: str | Path, *, weights_hash: str | None = None, tokenizer_hash: str | None = None,
        check: bool = False,
    ) -> Self:
        """Open a finished bank; ``check`` verifies every checksum, else only the sizes of files.

        Raises:
            ArtifactError: not a bank, a damaged one, or one of another model or tokenizer.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND, SCHEMA)
        for role, actual in (("checkpoint", weights_hash), ("tokenizer", tokenizer_hash)):
            if actual is not None:
                check_input(folder, manifest, role, actual)
        settings = BankSettings.from_dict(manifest.settings)
        codec, codec_hash = load_codec(folder / CODEC, settings.memory_lists)
        check_input(folder, manifest, "codec", codec_hash)
        try:
            check_files(folder, manifest, checksums=check, mend=mend(manifest))
        except ArtifactError:
            if read_manifest(folder, KIND, SCHEMA).hash == manifest.hash:
                raise
            return cls.open(folder, weights_hash=weights_hash, tokenizer_hash=tokenizer_hash, check=check)
        return cls(folder, manifest, settings, codec)

    def __len__(self) -> int:
        return self.settings.num_references

    def configure(self, config: Config) -> Config:
        """``config`` with the memory layers and heads, kept tokens and selection of this bank.

        Raises:
            ConfigError: the bank was written with another prefix or reference length.
        """
        settings, memory = self.settings, config.memory
        for name in ("prefix", "reference_length"):
            if getattr(memory, name) != getattr(settings, name):
                raise ConfigError(f"memory.{name}={getattr(memory, name)}: the bank {self.folder} was written with "
                                  f"{getattr(settings, name)}; use that or build the bank again")
        selection: Any = settings.selection
        return replace(config, memory=replace(
            memory, layers=layer_list(settings.memory_layers), heads=settings.memory_heads,
            tokens=str(settings.num_kept_tokens), selection=selection, spread=settings.spread,
        ))

    def read(self, ids: np.ndarray | Sequence[int], *, kv_heads: slice = slice(None)) -> ExplicitMemories:
        """The memories of ``ids``, in any order and with repeats, decoded; with ``kv_heads`` only those heads.

        Keys and values of heads that hold no memory are 0.
        Every record is one positional read (two for a part of the heads), checked against its checksum.

        Raises:
            DataError: an id that the bank does not have.
            ArtifactError: a record that is damaged.
        """
        codes_NCB, positions, num_kept = self.record.unpack(*self._read_whole(ids, kv_heads), kv_heads)
        kv = self.codec.decode(codes_NCB, positions, num_kept, kv_heads)
        return ExplicitMemories(kv=kv, positions=positions, num_kept=num_kept)

    def records(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """The records of ``ids`` as they stand on disk, uint8 [N, record_bytes], checked against their checksums.

        Raises:
            DataError, ArtifactError: as for :meth:`read`.
        """
        return np.concatenate(self._read_whole(ids, slice(None)), 1)

    def _read_whole(self, ids: np.ndarray | Sequence[int], kv_heads: slice) -> tuple[np.ndarray, np.ndarray]:
        """The codes of ``kv_heads`` and the tail of each record, undamaged."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            wrong = int(ids[(ids < 0) | (ids >= len(self))][0])
            raise DataError(f"{self.folder}: reference {wrong} is not in 0-{len(self) - 1}")
        assert kv_heads.step in (None, 1), "heads are a contiguous slice"
        try:
            codes, tail = self._read_bytes(ids, self.record.codes(kv_heads))
        except ArtifactError:
            if not self._follow():
                raise
            codes, tail = self._read_bytes(ids, self.record.codes(kv_heads))
        damaged = self.record.damaged_rows(codes, tail, kv_heads)
        if damaged:
            id = int(ids[damaged[0]])
            raise ArtifactError(f"{self.folder / self._place(id)[0]}: the record of reference {id} is damaged; "
                                f"{mend(self.manifest)}")
        return codes, tail

    def _read_bytes(self, ids: np.ndarray, place: slice) -> tuple[np.ndarray, np.ndarray]:
        """The codes at ``place`` and the tail of each record."""
        record = self.record
        codes = np.empty((len(ids), place.stop - place.start), np.uint8)
        tail = np.empty((len(ids), record.tail_bytes), np.uint8)
        is_whole = codes.shape[1] == record.codes_bytes
        for row, id in enumerate(ids.tolist()):
            name, offset = self._place(id)
            if is_whole:
                self.storage.read(name, offset, [codes[row], tail[row]])
            else:
                self.storage.read(name, offset + place.start, [codes[row]])
                self.storage.read(name, offset + record.codes_bytes, [tail[row]])
        return codes, tail

    def _place(self, id: int) -> tuple[str, int]:
        """The file that holds the record of a reference, and the byte at which it begins."""
        name, row = self.places(id)
        return name, row * self.record_bytes

    def _follow(self) -> bool:
        """Learn where records lie since an edit that took files away; false where there was none.

        What a record is made of never changes; a reference that was replaced or deleted is read as it is now.
        """
        manifest = read_manifest(self.folder, KIND, SCHEMA)
        if manifest.hash == self.manifest.hash or manifest.inputs["codec"] != self.manifest.inputs["codec"]:
            return False
        settings = BankSettings.from_dict(manifest.settings)
        self.places = Places(self.folder, settings.num_references, settings.block_size, settings.edits, manifest.files)
        return True


def mend(manifest: Manifest) -> str:
    """What a user can do about a damaged file of a bank."""
    if is_as_built(manifest):
        return "run `m3 bank build` into the folder again, it writes missing and damaged shards anew"
    return "bring the file back from a copy, or build a bank of the same references in another folder"


def is_as_built(manifest: Manifest) -> bool:
    """Whether a bank is as `m3 bank build` left it: never edited, or not since and not compacted."""
    return "edits" not in manifest.settings and all(name.startswith(("shard_", CODEC)) for name in manifest.files)
