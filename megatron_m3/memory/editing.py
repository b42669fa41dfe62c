"""Editing a bank: one writer at a time puts new files beside the old ones, then switches by the manifest.

Killed at any moment, it leaves the bank as it was or as it should be; what else it leaves, the next writer clears.
"""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from megatron_m3.errors import ArtifactError, DataError, M3Error
from megatron_m3.manifest import Manifest, atomic_path, hash_file, read_manifest, write_manifest
from megatron_m3.manifest.claims import CLAIMS
from megatron_m3.manifest.lock import FolderLock
from megatron_m3.memory.bank import CODEC, KIND, SCHEMA, BankSettings, MemoryBank, ShardFolder, is_as_built
from megatron_m3.memory.edits import EDIT, EMPTY, FOLDED
from megatron_m3.memory.record import RecordLayout
from megatron_m3.platform.progress import Progress
from megatron_m3.references import format_ids

type Files = dict[str, dict[str, Any]]
RECORDS = 1024
"""Records in RAM at a time."""


class BankWriter:
    """The right to change a bank; a context manager."""

    def __init__(self, folder: str | Path, command: str) -> None:
        """``command`` tells other writers who this is."""
        self.folder, self.command = Path(folder), command

    def __enter__(self) -> Self:
        """Take the lock, open the bank.

        Raises:
            ArtifactError: not a finished bank, or another process writes to it.
        """
        read_manifest(self.folder, KIND, SCHEMA)
        with ExitStack() as stack:
            self.lock = stack.enter_context(FolderLock(self.folder, self.command))
            self.bank = MemoryBank.open(self.folder)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def begin(self, name: str, job: Mapping[str, Any]) -> ShardFolder:
        """The folder of new shards, as far as a killed writer came with it; what others left is cleared."""
        self.clear(keep=name)
        return ShardFolder(self.folder / name, job)

    def commit(self, settings: BankSettings, files: Files, references: str = "") -> None:
        """Switch the bank to new settings and files, and clear what it no longer names.

        Args:
            settings: all of them.
            files: all of the bank, those of the codec too.
            references: hash of the knowledge base that it is of now; empty where it is the same.

        Raises:
            ArtifactError: another writer came between.
        """
        old = self.bank.manifest
        inputs = old.inputs | ({"references": references} if references else {})
        self.lock.check()
        if read_manifest(self.folder, KIND, SCHEMA).hash != old.hash:
            raise ArtifactError(f"{self.folder}: another process changed the bank meanwhile; give the command again")
        write_manifest(self.folder, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings.to_dict(),
                                             files=files, info=old.info))
        self.bank = MemoryBank.open(self.folder)
        self.clear()

    def empty_record(self) -> Files:
        """The file of the record without tokens, written where it is not there."""
        path = self.folder / EMPTY
        if EMPTY not in self.bank.manifest.files:
            with atomic_path(path) as temporary:
                temporary.write_bytes(empty_record(self.bank.record).tobytes())
        return {EMPTY: hash_file(path)}

    def clear(self, keep: str = "") -> None:
        """Remove what killed writers left: files that the manifest does not name, but those in the folder ``keep``."""
        named = set(self.bank.manifest.files)
        folders = {name.partition("/")[0] for name in named} | {keep}
        for path in [*self.folder.glob("**/.*.tmp"), *self.folder.glob(f"{EDIT}*/{CLAIMS}")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in [*self.folder.glob(f"{EDIT}*"), *self.folder.glob(f"{FOLDED}*")]:
            if path.name not in folders:
                shutil.rmtree(path, ignore_errors=True)
        for path in [*self.folder.glob("shard_*.*"), *self.folder.glob(f"{FOLDED}*/shard_*.*"),
                     *self.folder.glob(EMPTY)]:
            name = str(path.relative_to(self.folder).with_suffix(".bin"))
            if name not in named and not (keep and name.startswith(f"{keep}/")):
                path.unlink(missing_ok=True)


def refuse_edited(folder: Path, inputs: Mapping[str, str]) -> None:
    """Check that a build into ``folder`` would not undo what was edited since another.

    Raises:
        ArtifactError: it would.
    """
    if not (folder / "manifest.json").exists():
        return
    manifest = read_manifest(folder, KIND, SCHEMA)
    if not is_as_built(manifest) or any(manifest.inputs[role] != value for role, value in inputs.items()):
        raise ArtifactError(f"{folder}: the bank was edited since it was built, a build would undo that; edit it "
                            "further (`m3 bank update`) or build into another folder")


def empty_record(record: RecordLayout) -> np.ndarray:
    """The record of a reference without tokens, uint8 [1, record_bytes]."""
    lists, heads = record.held_LG.sum(), record.held_LG.shape
    positions = torch.zeros((1, *heads, record.num_kept_tokens), dtype=torch.int16)
    return record.pack(np.zeros((1, int(lists), record.list_bytes), np.uint8), positions,
                       torch.zeros(1, dtype=torch.int32))


def delete_references(folder: str | Path, ids: np.ndarray) -> str:
    """Make the memories of ``ids`` empty at once; return a line about it.

    Raises:
        M3Error: an id that the bank does not have; not a bank; another process writes to it.
    """
    with BankWriter(folder, "m3 bank delete") as writer:
        bank = writer.bank
        if len(ids) and not 0 <= ids[0] <= ids[-1] < len(bank):
            raise DataError(f"{folder}: reference {ids[-1]} is not in 0-{len(bank) - 1}")
        before = bank.places.deleted
        deleted = np.union1d(before, ids)
        if len(deleted) > len(before):
            edits = replace(bank.places.edits, deleted=format_ids(deleted))
            writer.commit(replace(bank.settings, edits=edits), bank.manifest.files | writer.empty_record())
        else:
            writer.clear()
        return f"{folder}: {len(deleted) - len(before):,} memories deleted, {len(deleted):,} in all"


def compact_bank(folder: str | Path) -> str:
    """Fold all edits into shards, as a build writes them, and remove what is no longer needed; return a line about it.

    A deleted reference's record stays, without tokens. Killed, it goes on where it was when called again.

    Raises:
        M3Error: not a bank; another process writes to it; the disk is too full.
    """
    with BankWriter(folder, "m3 bank compact") as writer:
        bank = writer.bank
        settings, places = replace(bank.settings, edits=None), bank.places
        touched = touched_shards(bank)
        if not touched:
            writer.clear()
            return f"{folder}: no edits to fold"
        name = FOLDED + bank.hash[:12]
        shards = writer.begin(name, {"kind": "folded shards", "bank": bank.hash})
        _write_folded(bank, settings, shards, touched)
        kept = {shard for index, shard in enumerate(places.shards) if index not in set(touched)}
        files = {file: entry for file, entry in bank.manifest.files.items()
                 if file in kept or file.startswith(f"{CODEC}/")}
        files |= {f"{name}/{shards.name(index)}": shards.entry(index) for index in touched}
        before = sum(entry["bytes"] for entry in bank.manifest.files.values())
        writer.commit(settings, files)
        after = sum(entry["bytes"] for entry in files.values())
        return (f"{folder}: edits of {len(places.ids):,} references folded into {len(touched):,} of "
                f"{settings.num_blocks:,} shards; {before:,} bytes before, {after:,} now")


def touched_shards(bank: MemoryBank) -> list[int]:
    """Shards that would be others if the bank were without edits, ascending."""
    return np.unique(bank.places.ids // bank.settings.block_size).tolist()


def _write_folded(bank: MemoryBank, settings: BankSettings, shards: ShardFolder, touched: list[int]) -> None:
    missing = [index for index in touched if not shards.done(index)]
    total = sum(len(settings.block(index)) for index in missing)
    check_room(bank.folder, total * bank.record_bytes)
    with Progress("folding", total, "records") as progress:
        for index in missing:
            shards.write_bytes(index, records_of(bank, settings.block(index), progress))


def records_of(bank: MemoryBank, ids: range, progress: Progress) -> bytes:
    """The records of ``ids``, undamaged, as a shard has them."""
    data = bytearray()
    for first in range(0, len(ids), RECORDS):
        data += bank.records(ids[first : first + RECORDS]).tobytes()
        progress.advance(len(ids[first : first + RECORDS]))
    return bytes(data)


def check_room(folder: Path, wanted: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        M3Error: fewer than ``wanted`` bytes are free.
    """
    usage = shutil.disk_usage(folder)
    if usage.total and wanted > usage.free:
        raise M3Error(f"{folder}: no disk space: {wanted:,} bytes are to be written, {usage.free:,} are free; free "
                      f"{wanted - usage.free:,} more")
