"""The memory bank: the explicit memories of all references on disk, read by id (architecture: bank record).

A folder with ``shard_NNNNNN.bin`` (``block_size`` records each, see :mod:`megatron_m3.memory.record`), ``codec/`` and a
manifest that names the model, the tokenizer and the references by hash. Reference ``id`` is record ``id % block_size``
of shard ``id // block_size``, unless it was edited since the bank was built, see :mod:`megatron_m3.memory.edits`.
"""

import collections
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_m3.config import Config, MemoryConfig
from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.manifest import BlockFolder, Manifest, check_files, check_input, read_manifest
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import load_codec
from megatron_m3.memory.edits import Edits, Places, shard_name
from megatron_m3.memory.mirror import BYTES, Mirror
from megatron_m3.memory.reader import RecordReader, Wanted
from megatron_m3.memory.record import RecordLayout
from megatron_m3.memory.remote import HttpStorage, download_description, is_url
from megatron_m3.memory.storage import LocalStorage, Storage
from megatron_m3.memory.types import ExplicitMemories, held_lists

KIND, SCHEMA = "bank", 2
CODEC = "codec"
DECODED_RECORDS = 64
"""Fewest records that are decoded at a time while others are read."""


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

    @classmethod
    def of(
        cls, config: Config, *, num_references: int, block_size: int, codec: str, token_bytes: int
    ) -> "BankSettings":
        """The settings of a bank that is written with the memory settings of ``config``."""
        model, memory = config.model, config.memory
        return cls(
            num_references=num_references, block_size=block_size, memory_layers=config.memory_layers,
            num_kept_tokens=memory.num_kept_tokens, selection=memory.selection, spread=memory.spread,
            prefix=memory.prefix, reference_length=memory.reference_length, num_kv_heads=model.num_kv_heads,
            head_size=model.head_size, codec=codec, token_bytes=token_bytes,
            memory_heads=head_list(config.memory_heads, model.num_kv_heads),
        )

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

    is_collective = False

    def __init__(
        self, address: str, manifest: Manifest, settings: BankSettings, codec: Codec, storage: Storage
    ) -> None:
        """``address`` is the folder or the URL, as the user gave it."""
        self.address, self.manifest, self.settings, self.codec = address, manifest, settings, codec
        self.folder, self.hash, self.record = Path(address), manifest.hash, settings.record
        self.codec_name, self.record_bytes = settings.codec, settings.record.record_bytes
        self.reader = RecordReader(storage)
        self.mirror: Mirror | None = None
        self._places_of = manifest.hash
        self.places = Places(address, settings.num_references, settings.block_size, settings.edits, manifest.files)
        self._parts: dict[tuple[int | None, int | None], tuple[RecordLayout, list[slice]]] = {}

    @classmethod
    def open(
        cls, folder: str | Path, *, weights_hash: str | None = None, tokenizer_hash: str | None = None,
        check: bool = False,
    ) -> Self:
        """Open a finished bank; ``check`` verifies every checksum, else only the sizes of files.

        Raises:
            ArtifactError: not a bank, a damaged one, or one of another model or tokenizer.
        """
        hashes = {"checkpoint": weights_hash, "tokenizer": tokenizer_hash}
        if is_url(folder):
            return cls._open_remote(str(folder), hashes, check=check)
        folder = Path(folder)
        manifest, settings, codec = _describe(folder, hashes)
        try:
            check_files(folder, manifest, checksums=check, mend=mend(manifest))
        except ArtifactError:
            if read_manifest(folder, KIND, SCHEMA).hash == manifest.hash:
                raise
            return cls.open(folder, weights_hash=weights_hash, tokenizer_hash=tokenizer_hash, check=check)
        return cls(str(folder), manifest, settings, codec, LocalStorage(folder))

    @classmethod
    def _open_remote(cls, address: str, hashes: Mapping[str, str | None], *, check: bool) -> Self:
        storage = HttpStorage(address)
        if check:
            raise ArtifactError(f"{address}: checksums of whole files are compared where the bank lies; run it there")
        with tempfile.TemporaryDirectory() as name:
            download_description(storage, Path(name), CODEC)
            try:
                manifest, settings, codec = _describe(Path(name), hashes)
            except ArtifactError as error:
                raise ArtifactError(str(error).replace(name, storage.address)) from None
        return cls(storage.address, manifest, settings, codec, storage)

    def __len__(self) -> int:
        return self.settings.num_references

    def keep_in(self, folder: Path, budget_bytes: int = BYTES) -> None:
        """Keep records that are read in a local folder, and look there first: for a bank that is far away."""
        self.mirror = Mirror(folder, self.hash, budget_bytes)

    def decode_on(self, device: torch.device | str) -> None:
        """Have codes become numbers on ``device``, so that little is carried there; until then on the CPU."""
        self.codec = self.codec.to(device)

    def configure(self, config: Config) -> Config:
        """``config`` with the memory layers and heads, kept tokens and selection of this bank.

        Raises:
            ConfigError: the bank was written with another prefix or reference length.
        """
        settings, memory = self.settings, config.memory
        for name in ("prefix", "reference_length"):
            if getattr(memory, name) != getattr(settings, name):
                raise ConfigError(f"memory.{name}={getattr(memory, name)}: the bank {self.address} was written with "
                                  f"{getattr(settings, name)}; use that or build the bank again")
        selection: Any = settings.selection
        return replace(config, memory=replace(
            memory, layers=layer_list(settings.memory_layers), heads=settings.memory_heads,
            tokens=str(settings.num_kept_tokens), selection=selection, spread=settings.spread,
        ))

    def read(
        self, ids: np.ndarray | Sequence[int], *, kv_heads: slice = slice(None),
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> ExplicitMemories:
        """The memories of ``ids``, in any order and with repeats, decoded; with ``kv_heads`` only those heads.

        Keys and values of heads that hold no memory are 0. Records are read in parallel, in the order in which they
        lie, while others are decoded; of each, only what holds ``kv_heads`` is, and its checksums are compared.

        Raises:
            DataError: an id that the bank does not have.
            ArtifactError: a record that is damaged.
        """
        distinct, inverse = self._distinct(ids)
        return self._reading(lambda: self._read(distinct, inverse, kv_heads, device, dtype))

    def _read(
        self, distinct: np.ndarray, inverse: np.ndarray | None, kv_heads: slice, device: torch.device | str,
        dtype: torch.dtype,
    ) -> ExplicitMemories:
        rows, parts = self._start(distinct, kv_heads)
        if len(rows) <= DECODED_RECORDS:
            collections.deque(parts, 0)
            whole = self.decode(rows, kv_heads, dtype).to(device, dtype)
        else:
            order, decoded = [], []
            for part in _joined(parts, DECODED_RECORDS):
                order += part
                decoded.append(self.decode(rows[part], kv_heads, dtype).to(device, dtype))
            whole = ExplicitMemories.concatenate(decoded)[np.argsort(order).tolist()]
        return whole if inverse is None else whole[inverse.tolist()]

    def rows(self, ids: np.ndarray | Sequence[int], kv_heads: slice = slice(None)) -> np.ndarray:
        """What the records of ``ids`` hold of ``kv_heads``, uint8 [N, bytes], each a record of these heads alone.

        Raises:
            DataError, ArtifactError: as for :meth:`read`.
        """
        distinct, inverse = self._distinct(ids)
        return self._reading(lambda: self._rows(distinct, inverse, kv_heads))

    def _rows(self, distinct: np.ndarray, inverse: np.ndarray | None, kv_heads: slice) -> np.ndarray:
        rows, parts = self._start(distinct, kv_heads)
        collections.deque(parts, 0)
        return rows if inverse is None else rows[inverse]

    def records(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """The records of ``ids`` as they stand on disk, uint8 [N, record_bytes], checked against their checksums.

        Raises:
            DataError, ArtifactError: as for :meth:`read`.
        """
        return self.rows(ids)

    def decode(
        self, rows: np.ndarray, kv_heads: slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> ExplicitMemories:
        """The memories in ``rows``, as :meth:`rows` gives them, where :meth:`decode_on` says."""
        codes_NCB, positions, num_kept = self._part(kv_heads)[0].unpack(rows)
        kv = self.codec.decode(codes_NCB, positions, num_kept, kv_heads, dtype)
        return ExplicitMemories(kv=kv, positions=positions, num_kept=num_kept)

    def _part(self, kv_heads: slice) -> tuple[RecordLayout, list[slice]]:
        """Layout of what a record holds of some heads, and the bytes that make it up."""
        assert kv_heads.step in (None, 1), "heads are a contiguous slice"
        key = (kv_heads.start, kv_heads.stop)
        if key not in self._parts:
            self._parts[key] = self.record.part(kv_heads)
        return self._parts[key]

    def _distinct(self, ids: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """The distinct ids, and for each of ``ids`` which of them it is; None where that is clear, as none repeats."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            wrong = int(ids[(ids < 0) | (ids >= len(self))][0])
            raise DataError(f"{self.address}: reference {wrong} is not in 0-{len(self) - 1}")
        distinct, inverse = np.unique(ids, return_inverse=True)
        return (ids, None) if len(distinct) == len(ids) else (distinct, inverse)

    def _start(self, ids: np.ndarray, kv_heads: slice) -> tuple[np.ndarray, Iterator[list[int]]]:
        """Rows for the records of distinct ``ids``, and numbers of rows as they are filled."""
        layout, pieces = self._part(kv_heads)
        rows = np.empty((len(ids), layout.record_bytes), np.uint8)
        wanted = Wanted(places=[self._place(id) for id in ids.tolist()], layout=layout, pieces=pieces)
        return rows, self._fill(ids, wanted, rows)

    def _fill(self, ids: np.ndarray, wanted: Wanted, rows: np.ndarray) -> Iterator[list[int]]:
        """Fill ``rows``, from the mirror where they are there."""
        if self.mirror is None:
            for part, damaged in self.reader.read(wanted, rows):
                if damaged:
                    raise self._damaged(int(ids[damaged[0]]))
                yield part
            return
        missing = self.mirror.read(wanted, rows)
        if missing:
            rest, fresh = wanted.some(missing), np.empty((len(missing), rows.shape[1]), np.uint8)
            for _, damaged in self.reader.read(rest, fresh):
                if damaged:
                    raise self._damaged(int(ids[missing[damaged[0]]]))
            self.mirror.write(rest, fresh)
            rows[missing] = fresh
        yield list(range(len(rows)))

    def _damaged(self, id: int) -> ArtifactError:
        return ArtifactError(f"{self.address}/{self._place(id)[0]}: the record of reference {id} is damaged; "
                             f"{mend(self.manifest)}")

    def _place(self, id: int) -> tuple[str, int]:
        """The file that holds the record of a reference, and the byte at which it begins."""
        name, row = self.places(id)
        return name, row * self.record_bytes

    def _reading[Result](self, read: Callable[[], Result]) -> Result:
        """What ``read`` returns; where an edit of the bank took files away meanwhile, it is called once more.

        What a record is made of never changes; a reference that was replaced or deleted is then read as it is now.
        """
        while True:
            try:
                return read()
            except ArtifactError:
                if not self._follow():
                    raise

    def _follow(self) -> bool:
        """Learn where records lie now; false where the bank was not edited."""
        try:
            now = type(self).open(self.address)
        except ArtifactError:
            return False
        if now.hash == self._places_of or now.manifest.inputs["codec"] != self.manifest.inputs["codec"]:
            return False
        self.places, self._places_of = now.places, now.hash
        return True


def mend(manifest: Manifest) -> str:
    """What a user can do about a damaged file of a bank."""
    if is_as_built(manifest):
        return "run `m3 bank build` into the folder again, it writes missing and damaged shards anew"
    return "bring the file back from a copy, or build a bank of the same references in another folder"


def is_as_built(manifest: Manifest) -> bool:
    """Whether a bank is as `m3 bank build` left it: never edited, or not since and not compacted."""
    return "edits" not in manifest.settings and all(name.startswith(("shard_", CODEC)) for name in manifest.files)


def _describe(folder: Path, hashes: Mapping[str, str | None]) -> tuple[Manifest, BankSettings, Codec]:
    """What a bank's manifest and codec say, checked against the hashes of given inputs."""
    manifest = read_manifest(folder, KIND, SCHEMA)
    for role, actual in hashes.items():
        if actual is not None:
            check_input(folder, manifest, role, actual)
    settings = BankSettings.from_dict(manifest.settings)
    codec, codec_hash = load_codec(folder / CODEC, settings.memory_lists)
    check_input(folder, manifest, "codec", codec_hash)
    return manifest, settings, codec


def _joined(parts: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """Parts put together to at least ``length``, but for the last."""
    joined: list[int] = []
    for part in parts:
        joined += part
        if len(joined) >= length:
            yield joined
            joined = []
    if joined:
        yield joined
