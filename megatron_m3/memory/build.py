"""Building a bank: processes claim the missing blocks of references, one after another, in the bank's folder.

MPI is used to begin: ranks agree that the job can be done, and encode the codec's sample together. From then on a rank
knows of the others only by their claims in the folder, which all of them see. So one may be slow or die, and ranks of
other jobs may come and help. What is computed depends on the block alone, on one thread, so any processes give the same
bytes.
"""

import contextlib
import functools
import itertools
import shutil
import time
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
from megatron_m3.manifest import Manifest, read_manifest, write_manifest
from megatron_m3.manifest.blocks import JOB
from megatron_m3.manifest.claims import CLAIMS, Claims
from megatron_m3.memory.bank import CODEC, KIND, SCHEMA, BankSettings, ShardFolder, head_list
from megatron_m3.memory.bank_codec import prepare_codec
from megatron_m3.memory.codec import KIND as CODEC_KIND
from megatron_m3.memory.codec import SCHEMA as CODEC_SCHEMA
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import SampleSize, check_codec, load_codec, resolve_codec, token_bytes
from megatron_m3.memory.editing import refuse_edited
from megatron_m3.memory.encode import LateMemories, start_encoding
from megatron_m3.memory.sensitivity import Sensitivity, measure_sensitivity
from megatron_m3.memory.space import MANIFEST, check_space, measure_space
from megatron_m3.memory.types import ExplicitMemories, held_lists
from megatron_m3.memory.work import POLL_SECONDS, Crew, OpenBlocks, Run, agree
from megatron_m3.memory.write import GROUP, write_blocks
from megatron_m3.model.checkpoint import LoadedModel, ModelDescription
from megatron_m3.references import ReferenceStore

__all__ = ["GROUP", "BankJob", "BankOrder", "build_bank", "write_missing"]

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


def build_bank(
    options: BankConfig, comm: Any, load: Callable[[Path], LoadedModel], *, begun: Callable[[], None] = lambda: None
) -> str | None:
    """Write the bank together with the other ranks of ``comm``, and with other jobs; every rank calls this.

    Args:
        options: of the job, the same on every rank.
        comm: MPI communicator.
        load: reads a checkpoint into this process, or its group of ``options.tensor_parallel`` processes.
        begun: called when ``comm`` is no longer needed.

    Returns:
        A line about the finished bank on rank 0, None elsewhere.

    Raises:
        M3Error: the first that met it; ToldError: on the other ranks.
    """
    with agree(comm):
        crew = Crew(comm, options.tensor_parallel)
        job = BankJob.open(options, load)
        if crew.rank == 0:
            check_space(measure_space(job.planned_settings(), job.key, job.folder,
                                      codec_shared=options.codec_shared))
    crew.join()
    folder = _begin_folder(job, comm)
    codec = prepare_codec(job, crew, folder.folder / CODEC)
    settings = job.settings(codec.name, codec.token_bytes)
    write_missing(job, crew, folder, codec, settings, begun=begun)
    if crew.leads:
        _finish(job, crew, folder, settings)
    if crew.rank:
        return None
    total = len(job.references) * settings.record.record_bytes
    return (f"{options.output}: {len(job.references):,} memories of {settings.record.record_bytes:,} bytes, "
            f"{total / 2**20:,.1f} MiB, codec {codec.name} ({codec.token_bytes} bytes a key and value)")


def _begin_folder(job: BankJob, comm: Any) -> ShardFolder:
    """The bank's folder, begun by rank 0 and cleared of what killed processes left half-written."""
    with agree(comm):
        if comm.rank == 0:
            ShardFolder(job.folder, job.key)
            refuse_edited(job.folder, job.inputs)
            with Claims(job.folder / CLAIMS) as claims:
                _clear(job.folder, claims)
    return ShardFolder(job.folder, job.key)


def _clear(folder: Path, claims: Claims, *, is_over: bool = False) -> None:
    """Remove what killed processes left half-written: what no living process has claimed, at the end all of it."""
    for path in folder.glob(".*.tmp"):
        name = path.name[1:].split(".")[0]
        # jobs that begin at once all write the record of the job
        if is_over or (f"{name}.json" != JOB and not claims.is_taken(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    claims.clear()


def write_missing(
    job: BankJob, crew: Crew, folder: ShardFolder, codec: Codec, settings: BankSettings, *,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Write the shards that are not there or damaged, with all ranks of ``crew``; returns when all are there.

    ``begun`` is called when the ranks need not talk to each other any more.

    Raises:
        M3Error: the first that met it; ToldError: on the other ranks.
    """
    missing = _find_missing(crew.comm, folder, settings.num_blocks)
    with contextlib.ExitStack() as stack:
        with agree(crew.comm):
            claims = stack.enter_context(Claims(folder.folder / CLAIMS))
        name = crew.comm.bcast(claims.owner)
        with agree(crew.comm):
            run = stack.enter_context(Run(claims.folder, name))
        begun()
        blocks = OpenBlocks(folder, claims, run, missing, first=crew.group * len(missing) // crew.num_groups)
        write_blocks(job, crew, blocks, codec, settings)
        Run.clear(claims.folder)


def _find_missing(comm: Any, folder: ShardFolder, num_blocks: int) -> list[int]:
    """Shards to be written: those that are not there, and those that are damaged; the ranks share the reading."""
    mine: list[int] = []
    with agree(comm):
        for index in range(comm.rank, num_blocks, comm.size):
            if not folder.done(index, checksum=True):
                folder.discard(index)
                mine.append(index)
    return sorted(itertools.chain.from_iterable(comm.allgather(mine)))


def _finish(job: BankJob, crew: Crew, folder: ShardFolder, settings: BankSettings) -> None:
    """Write the manifest, unless it is there already, and remove what killed processes left."""
    with Claims(folder.folder / CLAIMS) as claims:
        path, is_mine = folder.folder / MANIFEST, False
        while not path.exists():
            is_mine = claims.take(path.stem)
            if is_mine:
                _write_manifest(job, folder, settings)
            else:
                time.sleep(POLL_SECONDS)
        if crew.rank == 0 and not is_mine:
            _check_manifest(folder, settings)
        if is_mine or crew.rank == 0:
            _clear(folder.folder, claims, is_over=True)


def _check_manifest(folder: ShardFolder, settings: BankSettings) -> None:
    """Check that the manifest names the shards that are there.

    Raises:
        ArtifactError: some were damaged, and came out otherwise where they were written anew.
    """
    recorded = read_manifest(folder.folder, KIND, SCHEMA).files
    wrong = [name for name, entry in folder.files(settings.num_blocks).items() if entry != recorded.get(name, entry)]
    if wrong:
        raise ArtifactError(f"{folder.folder}: {len(wrong):,} shards that were damaged, such as {wrong[0]}, are whole "
                            "again with other last bits, as of another machine; to take them, remove the manifest.json "
                            "and give the command again")


def _write_manifest(job: BankJob, folder: ShardFolder, settings: BankSettings) -> None:
    place = folder.folder / CODEC
    codec_files = read_manifest(place, CODEC_KIND, CODEC_SCHEMA).files
    files = folder.files(settings.num_blocks) | {f"{CODEC}/{name}": entry for name, entry in codec_files.items()}
    inputs = job.inputs | {"codec": load_codec(place)[1]}
    write_manifest(folder.folder, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings.to_dict(),
                                           files=files))
