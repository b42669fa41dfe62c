"""What every artifact on disk says of itself, and the hash by which others name it.

An artifact is a folder with a ``manifest.json``. The manifest is written last and atomically, so a folder without one
is unfinished, never half an artifact.
"""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest.process import is_running, place

NAME = "manifest.json"
HALF_WRITTEN = re.compile(r"\.(?P<name>[^.]+\.[^.]+)\.(?P<place>.+)\.(?P<pid>\d+)\.tmp")
"""Names that :func:`atomic_path` gives."""
STANDSTILL = "M3_STANDSTILL"
"""Names a file that is there as long as a job has kept nothing since it began; a full disk lets it be removed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Identity of one artifact."""

    kind: str
    """What it is: tokenizer, tokens, references, embeddings, index, neighbours, checkpoint, codec, bank."""
    schema: int
    """Version of its layout on disk."""
    inputs: dict[str, str]
    """Hash of each artifact that it was made from, by role."""
    settings: dict[str, Any]
    """Settings that shaped it; plain JSON values."""
    files: dict[str, dict[str, Any]]
    """Bytes and SHA-256 of each file, by its path inside the folder."""
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Counts and notes for people; not part of the hash."""

    @property
    def hash(self) -> str:
        """SHA-256 over everything but ``info``: same inputs, settings and bytes give the same hash."""
        fields = dataclasses.asdict(self)
        del fields["info"]
        return hash_json(fields)


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file, as they stand in :attr:`Manifest.files`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{place()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):  # an open file fails without a name
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def tell_kept() -> None:
    """Tell the Slurm job of this process, if it is of one, that it has kept something which it need not do again."""
    if STANDSTILL in os.environ:
        Path(os.environ[STANDSTILL]).unlink(missing_ok=True)


def clear_half_written(folder: Path, names: Container[str]) -> None:
    """Remove what killed processes left of files ``names`` in ``folder``, none of which others need to write now.

    What a living process of this machine writes stays.
    """
    for path in folder.glob(".*.tmp"):
        found = HALF_WRITTEN.fullmatch(path.name)
        if found and found["name"] in names and not (found["place"] == place() and is_running(int(found["pid"]))):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that becomes it when the block ends well, and vanishes otherwise.

    Every process has a temporary folder of its own; what dead ones of this machine left since it started is removed.
    Older ones stay: on a shared disk they may be of a living machine of the same name. Of processes that write the same
    artifact the first to end gives the folder; that is no error for the others.

    Raises:
        ArtifactError: ``folder`` exists and is not an empty folder, or cannot be replaced since it is a mount point, or
            another process made something else of it.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ArtifactError(f"{folder}: exists already; remove it or choose another folder")
    if folder.is_mount():
        raise ArtifactError(f"{folder}: a file system is mounted there; choose a folder in it")
    mine = f".{folder.name}.{place()}."
    for left in folder.parent.glob(f"{glob.escape(mine)}*.tmp"):
        pid = left.name.removeprefix(mine).removesuffix(".tmp")
        if pid.isdecimal() and (int(pid) == os.getpid() or not is_running(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f"{mine}{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        try:
            temporary.replace(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not _is_same(temporary, folder):
                raise ArtifactError(f"{folder}: another process made it meanwhile, of something else; remove it or "
                                    "choose another folder") from None
        tell_kept()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same artifact, by the hash in their manifests."""
    hashes = []
    for path in (one / NAME, other / NAME):
        try:
            hashes.append(json.loads(path.read_text())["hash"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return bool(hashes[0] == hashes[1])


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name; its own copy where the file system has no hard links between the two."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder``, atomically; do it last."""
    fields = dataclasses.asdict(manifest) | {"hash": manifest.hash}
    with atomic_path(Path(folder) / NAME) as path:
        path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path, kind: str, schema: int) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        ArtifactError: no folder, no manifest, another kind or schema, or a manifest whose own hash does not fit.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        if not Path(folder).is_dir():
            raise ArtifactError(f"{folder}: {'is a file, not a folder' if Path(folder).exists() else 'no such folder'}")
        raise ArtifactError(f"{folder}: no {NAME}: unfinished, or not of kind {kind}; make it again")
    try:
        fields = json.loads(path.read_text())
        recorded = fields.pop("hash")
        manifest = Manifest(**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path}: not a readable manifest; make the {kind} again") from None
    if manifest.kind != kind:
        raise ArtifactError(f"{folder}: is of kind {manifest.kind}, not {kind}; give a folder of kind {kind}")
    if manifest.schema != schema:
        raise ArtifactError(f"{folder}: {kind} schema {manifest.schema}, this version reads {schema}; make it again")
    if manifest.hash != recorded:
        raise ArtifactError(f"{path}: the manifest was changed after it was written; make the {kind} again")
    return manifest


def check_files(
    folder: Path,
    manifest: Manifest,
    *,
    checksums: bool | Container[str] = False,
    names: Iterable[str] | None = None,
    mend: str | None = None,
) -> None:
    """Check that every file of an artifact is there with its size, and with ``checksums`` its SHA-256.

    Args:
        folder: the artifact's.
        manifest: its manifest.
        checksums: whether to read the files and compare checksums, or the names of the files to do that for.
        names: the only files to check; all by default.
        mend: what a user can do about a wrong file; to make the whole artifact again by default.

    Raises:
        ArtifactError: names the first file that is missing, truncated or changed.
    """
    mend = mend or f"remove {folder} and make the {manifest.kind} again"
    for name in manifest.files if names is None else names:
        path, recorded = Path(folder) / name, manifest.files.get(name)
        is_read = checksums if isinstance(checksums, bool) else name in checksums
        if recorded is None or not path.is_file():
            raise ArtifactError(f"{path}: missing; {mend}")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise ArtifactError(f"{path}: {size} bytes, the manifest says {recorded['bytes']}; {mend}")
        if is_read and hash_file(path) != recorded:
            raise ArtifactError(f"{path}: checksum differs from the manifest; the file is damaged; {mend}")


def check_input(folder: Path | str, manifest: Manifest, role: str, actual: str) -> None:
    """Check that an artifact was made from the ``role`` input with hash ``actual``; ``folder`` names it.

    Raises:
        ArtifactError: it was made from another one.
    """
    if manifest.inputs.get(role) != actual:
        raise ArtifactError(
            f"{folder}: this {manifest.kind} was made from another {role} ({manifest.inputs.get(role, 'none')[:12]}, "
            f"given {actual[:12]}); make it again or give the {role} it was made from"
        )


def is_finished(folder: Path, kind: str, schema: int, inputs: dict[str, str], settings: dict[str, Any]) -> bool:
    """Whether ``folder`` holds the finished artifact of this very job, so that there is nothing left to do.

    Raises:
        ArtifactError: it holds another artifact, or one with a file missing or cut short.
    """
    if not (Path(folder) / NAME).exists():
        return False
    manifest = read_manifest(folder, kind, schema)
    if manifest.inputs != inputs or manifest.settings != settings:
        raise ArtifactError(
            f"{folder}: holds {kind} made from other inputs or settings; remove it or choose another folder"
        )
    check_files(folder, manifest)
    return True
