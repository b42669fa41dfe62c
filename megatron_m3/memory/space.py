"""The room that a bank takes on disk, known before any of it is written."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m3.errors import M3Error
from megatron_m3.manifest import Manifest
from megatron_m3.manifest.blocks import CHECK
from megatron_m3.memory.bank import CODEC, KIND, SCHEMA, BankSettings, ShardFolder, shard_name
from megatron_m3.memory.codecs import codec_file_bytes

MANIFEST = "manifest.json"
CODEC_FILES = 2


@dataclass(frozen=True, kw_only=True)
class BankSpace:
    """What a bank takes on disk, and what of it is still missing."""

    folder: Path
    settings: BankSettings
    missing: list[int]
    """Shards that are not there with their recorded size."""
    shard_bytes: int
    """Of all shards."""
    manifest_bytes: int
    """Of the manifest and of the records of the job and of each shard."""
    codec_bytes: int
    """Of the codec, about."""
    has_codec: bool
    """Whether the codec is there, trained."""
    missing_bytes: int
    """What is still to be written."""
    free: int | None
    """Bytes free where the bank will lie, what a killed build left half-written included; None where unknown."""


def measure_space(
    settings: BankSettings, job: Mapping[str, Any], folder: Path, *, codec_shared: bool = False
) -> BankSpace:
    """Compare the bank that ``job`` will write to ``folder`` with what is there; writes nothing.

    Raises:
        ArtifactError: the folder holds something else.
    """
    is_begun = ShardFolder.is_begun(folder, job)
    missing = list(range(settings.num_blocks))
    if is_begun:
        missing = ShardFolder(folder, job).missing(settings.num_blocks)
    has_codec, has_manifest = (folder / CODEC / MANIFEST).exists(), (folder / MANIFEST).exists()
    record, entry, rest = _text_bytes(settings, job)
    codec = codec_file_bytes(settings.codec, settings.head_size, int(settings.memory_lists.sum()), shared=codec_shared)
    shards = sum(len(settings.block(index)) for index in missing) * settings.record.record_bytes
    manifest = rest + entry * (settings.num_blocks + (CODEC_FILES if codec else 0))
    begin = len(json.dumps({"key": "0" * 64, "job": dict(job)}, indent=1)) + 1
    return BankSpace(
        folder=folder, settings=settings, missing=missing, codec_bytes=codec, has_codec=has_codec,
        shard_bytes=settings.num_references * settings.record.record_bytes,
        manifest_bytes=begin + manifest + record * settings.num_blocks, free=_free(folder),
        missing_bytes=shards + record * len(missing) + (0 if is_begun else begin) + (0 if has_codec else codec)
        + (0 if has_manifest else manifest),
    )


def check_space(space: BankSpace) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        M3Error: less is free than is still missing.
    """
    if space.free is not None and space.missing_bytes > space.free:
        raise M3Error(f"{space.folder}: no disk space: {space.missing_bytes:,} bytes are still to be written, "
                      f"{space.free:,} are free; free {space.missing_bytes - space.free:,} more or choose another "
                      "folder")


def _text_bytes(settings: BankSettings, job: Mapping[str, Any]) -> tuple[int, int, int]:
    """Bytes of a shard's own record, of its entry in the manifest, and of the rest of the manifest."""
    sizes = {"bytes": settings.block_size * settings.record.record_bytes, "sha256": "0" * 64}
    record = len(json.dumps(sizes | {"info": {}, CHECK: "0" * 64})) + 1
    entry = len(json.dumps({"files": {shard_name(0): sizes}}, indent=1)) - len(json.dumps({"files": {}}, indent=1))
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=job["inputs"] | {"codec": "0" * 64},
                        settings=settings.to_dict(), files={})
    return record, entry, len(json.dumps(vars(manifest) | {"hash": "0" * 64}, indent=1)) + 1


def _free(folder: Path) -> int | None:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    left = sum(path.stat().st_size for path in folder.glob("**/.*.tmp"))
    return usage.free + left if usage.total else None
