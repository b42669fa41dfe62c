"""The codec of a bank that is being built: an earlier one, or a new one, trained on memories that all ranks encode."""

import contextlib
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from megatron_m3.errors import ArtifactError, M3Error
from megatron_m3.manifest import atomic_folder
from megatron_m3.manifest.claims import CLAIMS, Claims
from megatron_m3.memory.bank_order import BankJob
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import load_codec, train_codec
from megatron_m3.memory.sensitivity import Sensitivity
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.memory.work import POLL_SECONDS, Crew, agree
from megatron_m3.memory.write import GROUP
from megatron_m3.platform.progress import Progress

MEASURED = 256
"""References of the sample on which the codec's error is measured."""


def prepare_codec(job: BankJob, crew: Crew, place: Path) -> Codec:
    """The codec in ``place``; trained by rank 0 if no job has done so, or is doing so. Every rank calls this.

    Raises:
        M3Error: the sample is too small, the model has diverged, or the codec there is damaged.
    """
    with contextlib.ExitStack() as stack:
        with agree(crew.comm):
            claims = stack.enter_context(Claims(place.parent / CLAIMS))
            must_train = crew.rank == 0 and _must_train(job, place, claims)
        if crew.comm.bcast(must_train):
            sample = _encode_sample(job, crew)
            with agree(crew.comm):
                if crew.rank == 0:
                    try:
                        _train(job, crew, sample, place)
                    finally:
                        crew.tell(None)
                        claims.release(place.name)
                elif crew.group == 0:
                    while crew.tell(None) == "sensitivity":
                        job.sensitivity()
    with agree(crew.comm):
        return load_codec(place, job.memory_lists)[0]
    raise AssertionError("agree raises what the block did")


def _must_train(job: BankJob, place: Path, claims: Claims) -> bool:
    """Whether the codec is this job's to train; waits for another job that trains it.

    Raises:
        ArtifactError: it is gone, but not the shards that were written with it.
    """
    while not (place / "manifest.json").exists():
        if claims.take(place.name):
            if (place / "manifest.json").exists():  # since we looked
                claims.release(place.name)
                return False
            if len(job.sample_ids()) and any(place.parent.glob("shard_*.json")):
                raise ArtifactError(f"{place}: no codec, but shards that were written with it; bring it back from a "
                                    f"copy, or remove {place.parent} and build the bank again")
            return True
        time.sleep(POLL_SECONDS)
    return False


def _train(job: BankJob, crew: Crew, sample: ExplicitMemories, place: Path) -> None:
    def sensitivity() -> Sensitivity:
        crew.tell("sensitivity")
        return job.sensitivity()

    shutil.rmtree(place, ignore_errors=True)
    if job.given_codec:
        with atomic_folder(place) as folder:
            shutil.copytree(job.given_codec[0], folder, dirs_exist_ok=True)
        return
    head_size, dtype = job.loaded.config.model.head_size, job.loaded.config.training.dtype
    codec = train_codec(job.options.codec, sample, held_LG=job.memory_lists, dtype=dtype,
                        shared=job.options.codec_shared, sensitivity=sensitivity)
    if job.options.codec != "none":
        key, value = codec.errors(sample[:: -(-len(sample) // MEASURED)])
        why = " (auto)" * (job.options.codec == "auto")
        print(f"codec {codec.name}{why}: {codec.token_bytes} bytes for a key and value of {head_size} "
              f"numbers each, squared error {key:.4f} of keys, {value:.4f} of values", flush=True)
    with atomic_folder(place) as folder:
        codec.save(folder, {name: job.inputs[name] for name in ("checkpoint", "references")})


def _encode_sample(job: BankJob, crew: Crew) -> ExplicitMemories:
    """Memories of the codec's sample, on rank 0; other ranks, and the codec none, get no memories.

    The groups of ranks encode one group of references each at a time, and rank 0 puts them in their places: beside the
    sample there is room for one of them.
    """
    ids, failed = job.sample_ids(), list[M3Error]()
    sample = _room(job, len(ids) if crew.rank == 0 else 0)
    groups = [range(first, min(first + GROUP, len(ids))) for first in range(0, len(ids), GROUP)]
    with agree(crew.comm), Progress("codec sample", len(ids), "references", enabled=crew.rank == 0) as progress:
        for first in range(0, len(groups), crew.num_groups):
            several = groups[first : first + crew.num_groups]
            found = _encode_part(job, crew, ids[several[crew.group]]) if crew.group < len(several) else None
            if crew.rank and crew.leads and found is not None:
                crew.comm.send(found, 0)
            for source, rows in enumerate(several if crew.rank == 0 else []):
                part = crew.comm.recv(source=source * crew.tensor) if source else found
                if isinstance(part, M3Error):
                    failed.append(part)
                elif part is not None:
                    for whole, piece in zip(_tensors(sample), _tensors(part), strict=True):
                        whole[rows.start : rows.stop] = piece
                progress.advance(len(rows))
        if failed:
            raise failed[0]
    return sample


def _encode_part(job: BankJob, crew: Crew, ids: np.ndarray) -> ExplicitMemories | M3Error:
    """Memories, encoded by the ranks of a group together, or why there are none."""
    try:
        read: tuple[np.ndarray, np.ndarray] | M3Error = job.references.tokens(ids if crew.leads else ids[:0])
    except M3Error as error:
        read = error
    read = crew.tell(read)
    return read if isinstance(read, M3Error) else job.start(*read).collect()


def _room(job: BankJob, count: int) -> ExplicitMemories:
    """Room for the memories of ``count`` references."""
    model, layers = job.loaded.config.model, len(job.loaded.config.memory_layers)
    heads, kept = model.num_kv_heads, job.loaded.config.memory.num_kept_tokens
    return ExplicitMemories(
        kv=torch.empty(count, layers, 2, heads, kept, model.head_size),
        positions=torch.empty(count, layers, heads, kept, dtype=torch.int16),
        num_kept=torch.empty(count, dtype=torch.int32),
    )


def _tensors(memories: ExplicitMemories) -> tuple[torch.Tensor, ...]:
    return memories.kv, memories.positions, memories.num_kept
