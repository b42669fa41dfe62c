"""Building a bank: processes claim the missing blocks of references, one after another, in the bank's folder.

MPI is used to begin: ranks agree that the job can be done, and encode the codec's sample together. From then on a rank
knows of the others only by their claims in the folder, which all of them see. So one may be slow or die, and ranks of
other jobs may come and help. What is computed depends on the block alone, on one thread, so any processes give the same
bytes.
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_m3.config.bank import BankConfig
from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import Manifest, read_manifest, write_manifest
from megatron_m3.manifest.blocks import JOB
from megatron_m3.manifest.claims import CLAIMS, Claims
from megatron_m3.memory.bank import CODEC, KIND, SCHEMA, BankSettings, ShardFolder
from megatron_m3.memory.bank_codec import prepare_codec
from megatron_m3.memory.bank_order import BankJob
from megatron_m3.memory.codec import KIND as CODEC_KIND
from megatron_m3.memory.codec import SCHEMA as CODEC_SCHEMA
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import load_codec
from megatron_m3.memory.editing import refuse_edited
from megatron_m3.memory.space import MANIFEST, check_space, measure_space
from megatron_m3.memory.work import POLL_SECONDS, Crew, OpenBlocks, Run, agree
from megatron_m3.memory.write import write_blocks
from megatron_m3.model.checkpoint import LoadedModel


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
