"""Block files: a long job writes numbered blocks, each whole or absent, so that it can stop and go on anywhere.

Each block is one safetensors file with its own record ``NAME.json`` (bytes, SHA-256, counts), written after it.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest.manifest import (
    Manifest,
    atomic_path,
    check_files,
    clear_half_written,
    hash_file,
    hash_json,
    tell_kept,
)

JOB = "job.json"
DTYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
          "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""numpy's names of safetensors' types."""
CHECK = "check"
"""Field of a block's record: SHA-256 of the others."""
OPEN_BLOCKS = 256
"""Most blocks mapped at a time."""


def block_name(index: int) -> str:
    """File name of block ``index``."""
    return f"block_{index:06d}.safetensors"


def map_block(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, memory-mapped and read-only: only what is indexed is read from disk.

    Raises:
        ArtifactError: the file is missing, cut short or not safetensors.
    """
    try:
        data = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        return {
            name: data[start + first : start + last].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
            for first, last in [entry["data_offsets"]]
        }
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ArtifactError(f"{path}: not a readable block file ({error}); make it again") from None


def _read_json(path: Path, fields: set[str], otherwise: str) -> dict[str, Any]:
    """A JSON object that has ``fields``; ``otherwise`` says what it should be and the mend."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not fields <= found.keys():
        raise ArtifactError(f"{path}: damaged, not {otherwise}")
    return found


class BlockReader:
    """The blocks of a finished artifact, mapped when first asked for.

    The first use of a block in a process reads it whole, once, to compare its SHA-256 with the manifest's (about 1 s a
    GB, and it warms the file cache); what is mapped again later is not read again.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._verified: set[str] = set()
        self._map = functools.lru_cache(OPEN_BLOCKS)(self._verify_and_map)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of block ``index``, as :func:`map_block` gives them.

        Raises:
            ArtifactError: the block is missing or not what was written.
        """
        return self._map(index)

    def _verify_and_map(self, index: int) -> dict[str, np.ndarray]:
        name = block_name(index)
        if name not in self._verified:
            check_files(self.folder, self.manifest, checksums=True, names=[name])
            self._verified.add(name)
        return map_block(self.folder / name)


class BlockFolder:
    """A folder that fills block by block, for one job given by the hash of its inputs and settings."""

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """Open or create ``folder`` for ``job`` (its kind, input hashes and settings, as JSON values).

        Raises:
            ArtifactError: the folder holds blocks of another job, or its record of the job is damaged.
        """
        self.folder = Path(folder)
        self._checked: set[int] = set()
        if not self.is_begun(self.folder, job):
            self._begin(job)
            self.is_begun(self.folder, job)  # not another one, that began at the same time

    def _begin(self, job: Mapping[str, Any]) -> None:
        """Record the job, unless one has been recorded since we looked."""
        path, record = self.folder / JOB, {"key": hash_json(dict(job)), "job": dict(job)}
        with contextlib.suppress(FileExistsError), atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:  # no hard links on this file system: the last of two wins
                pass

    @staticmethod
    def is_begun(folder: Path, job: Mapping[str, Any]) -> bool:
        """Whether ``job`` was begun in ``folder``; false where it can be. Writes nothing.

        Raises:
            ArtifactError: as for the constructor.
        """
        path = folder / JOB
        if path.exists():
            found = _read_json(path, {"key"}, f"the record of a job; remove {folder} or choose another folder")
            if found["key"] != hash_json(dict(job)):
                raise ArtifactError(
                    f"{folder}: holds blocks made from other inputs or settings; remove it or choose another folder"
                )
            return True
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder}: is a file; choose another folder")
        if folder.exists() and any(not one.name.startswith(".") for one in folder.iterdir()):  # another may begin now
            raise ArtifactError(f"{folder}: not empty, and not begun by this job; choose another folder")
        return False

    def name(self, index: int) -> str:
        """File name of block ``index``."""
        return block_name(index)

    def done(self, index: int, *, checksum: bool = False) -> bool:
        """Whether block ``index`` is there, whole: its size is the recorded one, with ``checksum`` its SHA-256 too."""
        path = self.folder / self.name(index)
        if not (path.exists() and path.with_suffix(".json").exists()):
            return False
        recorded = self.entry(index)
        return recorded["bytes"] == path.stat().st_size and (not checksum or hash_file(path) == recorded)

    def checked(self, index: int) -> Path:
        """The path of block ``index``; a process's first use of it reads it whole, to compare its SHA-256.

        Raises:
            ArtifactError: it is not what was written; see :meth:`damaged`.
        """
        path = self.folder / self.name(index)
        if index not in self._checked and hash_file(path) != self.entry(index):
            raise self.damaged(index, path)
        self._checked.add(index)
        return path

    def damaged(self, index: int, path: Path) -> ArtifactError:
        """The error that a file of block ``index`` is damaged; the block counts as not written from now on."""
        self.discard(index)
        return ArtifactError(f"{path}: damaged since it was written; run the same command again: it makes this block "
                             "anew")

    def discard(self, index: int) -> None:
        """Let block ``index`` count as not written: its record goes, and with it what :meth:`done` says."""
        (self.folder / self.name(index)).with_suffix(".json").unlink(missing_ok=True)

    def clear_half_written(self, num_blocks: int) -> None:
        """Remove what killed processes left of blocks, all of which are written now."""
        blocks = [self.name(index) for index in range(num_blocks)]
        clear_half_written(self.folder, {*blocks, *(str(Path(name).with_suffix(".json")) for name in blocks)})

    def missing(self, num_blocks: int) -> list[int]:
        """Blocks that are still to be written."""
        return [index for index in range(num_blocks) if not self.done(index)]

    def write(self, index: int, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any] | None = None) -> None:
        """Write block ``index`` atomically: the arrays, then its record."""
        self.write_bytes(index, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}), info)

    def write_bytes(self, index: int, data: bytes | bytearray, info: Mapping[str, Any] | None = None) -> None:
        """Write block ``index`` atomically as the bytes ``data``, then its record."""
        with self.writing(index, dict(info or {})) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def writing(self, index: int, info: Mapping[str, Any]) -> Iterator[Path]:
        """A temporary path that becomes block ``index`` when the `with` ends well; ``info`` may be filled meanwhile."""
        path = self.folder / self.name(index)
        with atomic_path(path) as temporary:
            yield temporary
        record = json.loads(json.dumps(hash_file(path) | {"info": dict(info)}))
        record[CHECK] = hash_json(record)
        with atomic_path(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record, sort_keys=True) + "\n")
        tell_kept()

    def info(self, num_blocks: int) -> Iterator[dict[str, Any]]:
        """The ``info`` of every block, in order."""
        return map(self.read_info, range(num_blocks))

    def read_info(self, index: int) -> dict[str, Any]:
        """The ``info`` of one block."""
        info: dict[str, Any] = self._record(index)["info"]
        return info

    def files(self, num_blocks: int) -> dict[str, dict[str, Any]]:
        """The ``files`` entry of the finished artifact's manifest."""
        return {self.name(index): self.entry(index) for index in range(num_blocks)}

    def entry(self, index: int) -> dict[str, Any]:
        """Bytes and SHA-256 of block ``index``."""
        record = self._record(index)
        return {"bytes": record["bytes"], "sha256": record["sha256"]}

    def _record(self, index: int) -> dict[str, Any]:
        path = (self.folder / self.name(index)).with_suffix(".json")
        otherwise = "a record of a block; remove it and run the job again"
        record = _read_json(path, {"bytes", "sha256", "info"}, otherwise)
        if record.pop(CHECK, None) not in (None, hash_json(record)):
            raise ArtifactError(f"{path}: damaged, not {otherwise}")
        return record
