"""Building a bank with MPI: ranks take the missing blocks of references, one after another, from a shared counter.

What a rank computes depends on the block alone, and every rank computes on one thread, so any number of ranks gives
the same bytes. The ranks share one folder on a file system that all of them see.
"""

import functools
import itertools
import shutil
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
from megatron_m3.manifest import Manifest, atomic_path, read_manifest, write_manifest
from megatron_m3.memory.bank import CODEC, KIND, SCHEMA, BankSettings, ShardFolder, head_list
from megatron_m3.memory.codec import KIND as CODEC_KIND
from megatron_m3.memory.codec import SCHEMA as CODEC_SCHEMA
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import (
    SampleSize,
    check_codec,
    load_codec,
    resolve_codec,
    token_bytes,
    train_codec,
)
from megatron_m3.memory.editing import refuse_edited
from megatron_m3.memory.encode import encode_references
from megatron_m3.memory.sensitivity import Sensitivity, measure_sensitivity
from megatron_m3.memory.space import check_space, measure_space
from megatron_m3.memory.types import ExplicitMemories, held_lists
from megatron_m3.memory.work import SharedWork, agree
from megatron_m3.model.checkpoint import LoadedModel, ModelDescription
from megatron_m3.platform.progress import Progress
from megatron_m3.references import ReferenceStore

GROUP = 128
"""References whose memories are in RAM at a time."""


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
        """References, drawn uniformly among those that have tokens, that the codec is trained on; none for none."""
        alive = np.flatnonzero(self.lengths)
        count = min(self.options.codec_sample, len(alive)) if self.trains_codec else 0
        return np.sort(np.random.default_rng(self.options.seed).choice(alive, count, replace=False))

    @property
    def trains_codec(self) -> bool:
        """Whether the codec is learned from the references: not where there is none, or another bank has it."""
        return self.options.codec != "none" and not self.options.codec_from

    @functools.cached_property
    def given_codec(self) -> tuple[Path, Codec, str] | None:
        """Folder, codec and its hash, of the bank whose codec is taken.

        Raises:
            ArtifactError: it does not suit this bank's memories.
        """
        if not self.options.codec_from:
            return None
        folder = Path(self.options.codec_from)
        found = read_manifest(folder, KIND, SCHEMA)
        other = BankSettings.from_dict(found.settings)
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
        tokens, lengths = self.references.tokens(np.asarray(ids))
        return encode_references(self.loaded, tokens, lengths, batch_tokens=self.options.batch_tokens)


def build_bank(options: BankConfig, comm: Any, load: Callable[[Path], LoadedModel]) -> str | None:
    """Write the bank together with the other ranks of ``comm``; every rank calls this.

    Args:
        options: of the job, the same on every rank.
        comm: MPI communicator.
        load: reads a checkpoint into this process alone.

    Returns:
        A line about the finished bank on rank 0, None elsewhere.

    Raises:
        M3Error: the same on all ranks, whichever met it.
    """
    with agree(comm):
        job = BankJob.open(options, load)
        if comm.rank == 0:
            check_space(measure_space(job.planned_settings(), job.key, job.folder,
                                      codec_shared=options.codec_shared))
    folder = _open_folder(job, comm)
    codec = _prepare_codec(job, comm, folder)
    settings = job.settings(codec.name, codec.token_bytes)
    write_missing(job, comm, folder, codec, settings)
    if comm.rank:
        return None
    _finish(job, folder, settings, load_codec(folder.folder / CODEC)[1])
    total = len(job.references) * settings.record.record_bytes
    return (f"{options.output}: {len(job.references):,} memories of {settings.record.record_bytes:,} bytes, "
            f"{total / 2**20:,.1f} MiB, codec {codec.name} ({codec.token_bytes} bytes a key and value)")


def _open_folder(job: BankJob, comm: Any) -> ShardFolder:
    """The bank's folder, begun by rank 0 and cleared of what killed processes left half-written."""
    with agree(comm):
        if comm.rank == 0:
            ShardFolder(job.folder, job.key)
            refuse_edited(job.folder, job.inputs)
            for left in job.folder.glob("**/.*.tmp"):
                left.unlink()
    return ShardFolder(job.folder, job.key)


def _prepare_codec(job: BankJob, comm: Any, folder: ShardFolder) -> Codec:
    """The codec: one that an earlier run trained, or a new one, trained by rank 0 on memories that all ranks encode."""
    place = folder.folder / CODEC
    if not comm.bcast((place / "manifest.json").exists() if comm.rank == 0 else None):
        head_size, dtype = job.loaded.config.model.head_size, job.loaded.config.training.dtype
        sample = _encode_sample(job, comm)
        with agree(comm):
            if comm.rank == 0 and job.given_codec:
                _copy_codec(job.given_codec[0], place)
            elif comm.rank == 0:
                codec = train_codec(job.options.codec, sample, held_LG=job.memory_lists, dtype=dtype,
                                    shared=job.options.codec_shared, sensitivity=job.sensitivity)
                if job.options.codec != "none":
                    key, value = codec.errors(sample)
                    keys = len(sample.vectors(0, job.memory_lists))
                    why = f" (auto: what {keys:,} keys can train)" * (job.options.codec == "auto")
                    print(f"codec {codec.name}{why}: {codec.token_bytes} bytes for a key and value of {head_size} "
                          f"numbers each, squared error {key:.4f} of keys, {value:.4f} of values", flush=True)
                shutil.rmtree(place, ignore_errors=True)
                codec.save(place, {name: job.inputs[name] for name in ("checkpoint", "references")})
    with agree(comm):
        return load_codec(place, job.memory_lists)[0]
    raise AssertionError("agree raises what the block did")


def _copy_codec(source: Path, place: Path) -> None:
    """Another bank's codec, its manifest last."""
    place.mkdir(exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "manifest.json"):
        with atomic_path(place / path.name) as temporary:
            shutil.copyfile(path, temporary)


def _encode_sample(job: BankJob, comm: Any) -> ExplicitMemories:
    """Memories of the codec's sample, on rank 0: groups of it are shared out in turn and put together in order.

    Other ranks, and the codec none, get no memories.
    """
    ids = job.sample_ids()
    groups = [ids[first : first + GROUP] for first in range(0, len(ids), GROUP)]
    mine = []
    with agree(comm), Progress("codec sample", len(ids), "references", enabled=comm.rank == 0) as progress:
        for group in groups[comm.rank :: comm.size]:
            mine.append(job.encode(group))
            progress.advance(min(len(group) * comm.size, len(ids) - progress.count))
    gathered = comm.gather(mine)
    if gathered is None or not len(ids):
        return job.encode(ids[:0])
    return ExplicitMemories.concatenate([gathered[index % comm.size][index // comm.size]
                                         for index in range(len(groups))])


def write_missing(job: BankJob, comm: Any, folder: ShardFolder, codec: Codec, settings: BankSettings) -> None:
    """Write the shards that are not there or damaged, with all ranks of ``comm``."""
    _write_blocks(job, comm, folder, codec, settings, _find_missing(comm, folder, settings.num_blocks))


def _find_missing(comm: Any, folder: ShardFolder, num_blocks: int) -> list[int]:
    """Shards to be written: those that are not there, and those that are damaged; the ranks share the reading."""
    mine: list[int] = []
    with agree(comm):
        mine.extend(index for index in range(comm.rank, num_blocks, comm.size) if not folder.done(index, checksum=True))
    return sorted(itertools.chain.from_iterable(comm.allgather(mine)))


def _write_blocks(
    job: BankJob, comm: Any, folder: ShardFolder, codec: Codec, settings: BankSettings, missing: list[int]
) -> None:
    """Take missing blocks until there are none; rank 0 shows the progress of all."""
    total, shows = sum(len(settings.block(index)) for index in missing), comm.rank == 0 and len(missing) > 0

    def show() -> None:
        if shows:
            progress.advance(work.done() - progress.count)

    def write(place: int) -> None:
        ids, shard = settings.block(missing[place]), bytearray()
        for first in range(0, len(ids), GROUP):
            memories = job.encode(ids[first : first + GROUP])
            shard += settings.record.pack(codec.encode(memories), memories.positions, memories.num_kept).tobytes()
            work.add_done(len(memories))
            show()
        folder.write_bytes(missing[place], shard)

    with SharedWork(comm, len(missing)) as work, Progress("bank", total, "references", enabled=shows) as progress:
        work.run(write, show)
        show()


def _finish(job: BankJob, folder: ShardFolder, settings: BankSettings, codec_hash: str) -> None:
    """Write the manifest, unless it is there already."""
    codec_files = read_manifest(folder.folder / CODEC, CODEC_KIND, CODEC_SCHEMA).files
    refuse_edited(job.folder, job.inputs)
    files = folder.files(settings.num_blocks) | {f"{CODEC}/{name}": entry for name, entry in codec_files.items()}
    write_manifest(folder.folder, Manifest(kind=KIND, schema=SCHEMA, inputs=job.inputs | {"codec": codec_hash},
                                           settings=settings.to_dict(), files=files))
