"""A bank follows its knowledge base: what was added or replaced there is encoded, what was deleted becomes empty."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_m3.config.bank import BankConfig
from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import atomic_path, check_input, hash_json, link_or_copy
from megatron_m3.memory.bank import MemoryBank, ShardFolder
from megatron_m3.memory.bank_order import BankJob
from megatron_m3.memory.build import write_missing
from megatron_m3.memory.editing import BankWriter, Files, check_room, records_of, touched_shards
from megatron_m3.memory.edits import EDIT, EditFolder, shard_name
from megatron_m3.memory.verify import built_batch_tokens
from megatron_m3.memory.work import Crew, agree
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.platform.progress import Progress
from megatron_m3.references import Edit, ReferenceStore, SelectedReferences, format_ids

Only = Literal["", "add", "replace"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an edited knowledge base asks of a bank."""

    references: ReferenceStore
    steps: tuple[Edit, ...]
    """Of the knowledge base, since the one that the bank is of."""
    written: np.ndarray
    """Ids that get a new record, ascending."""
    emptied: np.ndarray
    """Ids that have no tokens any more, ascending."""

    @classmethod
    def of(cls, bank: MemoryBank, folder: str | Path, only: Only = "") -> "Plan":
        """What the knowledge base in ``folder`` asks of ``bank``.

        Raises:
            ArtifactError: it does not descend from the bank's.
            ConfigError: it has edits other than ``only`` names.
        """
        references = ReferenceStore.open(folder)
        steps = references.edits_since(bank.manifest.inputs["references"])
        others = {"add": ("replaced", "deleted"), "replace": ("added", "deleted"), "": ()}[only]
        for step in steps:
            for name in others:
                if ids := getattr(step, name):
                    raise ConfigError(f"references={folder}: references {ids[:40]} were {name} too; `m3 bank update` "
                                      "follows every edit")
        ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(step.ids for step in steps)]))
        has_tokens = [references.tokens(some)[1] > 0 for some in batched(ids.tolist(), 1 << 16)]
        alive = np.concatenate([np.zeros(0, bool), *has_tokens])
        return cls(references=references, steps=steps, written=ids[alive], emptied=ids[~alive])

    def commit(self, writer: BankWriter, folder: str, block_size: int, files: Files) -> None:
        """Switch the bank; the new records are in ``folder``."""
        bank = writer.bank
        new = EditFolder(name=folder, ids=format_ids(self.written), block_size=block_size)
        folders = (*bank.places.edits.folders, *([new] if len(self.written) else []))
        deleted = np.union1d(np.setdiff1d(bank.places.deleted, self.written), self.emptied)
        edits = replace(bank.places.edits, folders=folders, deleted=format_ids(deleted))
        whole = bank.manifest.files | {f"{folder}/{name}": entry for name, entry in files.items()}
        if len(deleted):
            whole |= writer.empty_record()
        settings = replace(bank.settings, num_references=len(self.references), edits=edits)
        writer.commit(settings, whole, self.references.hash)

    def tell(self, bank: MemoryBank, how: str) -> str:
        """A line about what was done."""
        return (f"{bank.folder}: {len(self.written):,} memories {how}, {len(self.emptied):,} made empty; "
                f"{len(bank):,} references, knowledge base {self.references.hash[:12]}")


def update_bank(
    folder: Path, references: Path, checkpoint: Path | None, comm: Any, load: Callable[[Path], LoadedModel], *,
    only: Only = "", command: str = "m3 bank update",
) -> str | None:
    """Bring a bank to an edited knowledge base, together with the other ranks of ``comm``; every rank calls this.

    Args:
        folder: the bank's.
        references: a knowledge base that descends from the bank's.
        checkpoint: the bank's model; None will do where nothing is to be encoded.
        comm: MPI communicator.
        load: reads a checkpoint into this process alone.
        only: refuse edits of another kind.
        command: tells other writers who this is.

    Returns:
        A line about it on rank 0, None elsewhere.

    Raises:
        M3Error: the same on all ranks, whichever met it.
    """
    with ExitStack() as stack:
        with agree(comm):
            writer = stack.enter_context(BankWriter(folder, command)) if comm.rank == 0 else None
        with agree(comm):
            bank = writer.bank if writer else MemoryBank.open(folder)
            plan = Plan.of(bank, references, only)
        if not plan.steps:
            if writer:
                writer.clear()
            return f"{folder}: is of {references} already" if writer else None
        name, files = _encode(bank, plan, checkpoint, comm, load, writer) if len(plan.written) else ("", {})
        with agree(comm):
            if writer:
                plan.commit(writer, name, bank.settings.block_size, files)
                return plan.tell(writer.bank, "encoded")
    return None


def _encode(
    bank: MemoryBank, plan: Plan, checkpoint: Path | None, comm: Any, load: Callable[[Path], LoadedModel],
    writer: BankWriter | None,
) -> tuple[str, Files]:
    """Write the new records with all ranks; the name of their folder and its files."""
    settings = replace(bank.settings, num_references=len(plan.written), edits=None)
    with agree(comm):
        crew = Crew(comm)
        if checkpoint is None:
            raise ConfigError(f"checkpoint: missing; {len(plan.written):,} references are to be encoded, give the "
                              "bank's model")
        loaded = load(checkpoint)
        check_input(bank.folder, bank.manifest, "checkpoint", loaded.weights_hash)
        job = BankJob(
            options=BankConfig(checkpoint=str(checkpoint), references=str(plan.references.folder),
                               output=str(bank.folder), block_size=settings.block_size,
                               batch_tokens=built_batch_tokens(bank)),
            loaded=replace(loaded, config=bank.configure(loaded.config)),
            references=SelectedReferences(plan.references, plan.written))
    key = {"kind": "edit", "bank": bank.hash, "references": plan.references.hash}
    name = EDIT + hash_json(key)[:12]
    with agree(comm):
        if writer:
            shards = writer.begin(name, key)
            left = sum(len(settings.block(index)) for index in shards.missing(settings.num_blocks))
            check_room(bank.folder, left * bank.record_bytes)
    shards = ShardFolder(bank.folder / name, key)
    write_missing(job, crew, shards, bank.codec, settings)
    return name, shards.files(settings.num_blocks) if writer else {}


SAME = ("memory_layers", "num_kept_tokens", "selection", "spread", "prefix", "reference_length", "num_kv_heads",
        "head_size", "codec", "token_bytes", "memory_heads")
"""Settings that two banks share whose records are of one kind."""


def merge_bank(folder: Path, other_folder: Path, references: Path) -> str:
    """Take all records of another bank, without encoding; return a line about it.

    Args:
        folder: the bank's.
        other_folder: a bank of the same model with the same codec.
        references: the bank's knowledge base, to which the other's was appended.

    Raises:
        M3Error: they do not go together; another process writes to the bank.
    """
    other = MemoryBank.open(other_folder)
    with BankWriter(folder, "m3 bank merge") as writer:
        bank = writer.bank
        plan = Plan.of(bank, references)
        if not plan.steps:
            writer.clear()
            return f"{folder}: is of {references} already"
        _check_alike(bank, other)
        appended = [step.appended for step in plan.steps]
        if appended != [other.manifest.inputs["references"]]:
            raise ArtifactError(f"{references}: is not the knowledge base of {folder} with that of {other_folder} "
                                "appended; make it with `m3 data edit-references --append`")
        shift = len(bank)
        key = {"kind": "edit", "bank": bank.hash, "other": other.hash, "references": plan.references.hash}
        name, size = EDIT + hash_json(key)[:12], other.settings.block_size
        shards, whole = writer.begin(name, key), np.arange(shift, shift + len(other))
        files = _take_shards(other, shards)
        plan = replace(plan, written=whole, emptied=shift + other.places.deleted)
        plan.commit(writer, name, size, files)
        return plan.tell(writer.bank, f"taken from {other_folder}")
    raise AssertionError("unreachable")


def _check_alike(bank: MemoryBank, other: MemoryBank) -> None:
    for role in ("checkpoint", "tokenizer"):
        check_input(other.folder, other.manifest, role, bank.manifest.inputs[role])
    for name in SAME:
        one, two = getattr(bank.settings, name), getattr(other.settings, name)
        if one != two:
            raise ArtifactError(f"{other.folder}: has {name} {two}, {bank.folder} has {one}; build it again with the "
                                f"settings of the other and --codec-from {bank.folder}")
    if bank.manifest.inputs["codec"] != other.manifest.inputs["codec"]:
        raise ArtifactError(f"{other.folder}: has another codec than {bank.folder}; build it with --codec-from "
                            f"{bank.folder}")


def _take_shards(other: MemoryBank, shards: ShardFolder) -> Files:
    """The shards of ``other`` as those of an edit: shared where the file system allows, written where it was edited."""
    files, touched, settings = {}, set(touched_shards(other)), other.settings
    total = sum(len(settings.block(index)) for index in touched)
    check_room(shards.folder, total * other.record_bytes)
    with Progress("merging", len(other), "records") as progress:
        for index in range(settings.num_blocks):
            name = shard_name(index)
            if index in touched:
                shards.write_bytes(index, records_of(other, settings.block(index), progress))
                files[name] = shards.entry(index)
            else:
                source = other.places.shards[index]
                with atomic_path(shards.folder / name) as temporary:
                    link_or_copy(other.folder / source, temporary)
                files[name] = other.manifest.files[source]
                progress.advance(len(settings.block(index)))
    return files
