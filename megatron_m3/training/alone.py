"""One run at a time in a folder: two would take each other's half-written checkpoints for leftovers of killed ones."""

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_m3.errors import ArtifactError, warn
from megatron_m3.manifest.lock import NAME, FolderLock, read_owner
from megatron_m3.model.checkpoint import list_checkpoints
from megatron_m3.platform.distributed import on_first_process
from megatron_m3.training.metrics import say

CANNOT_LOCK = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)
"""What file systems without hard links say."""


@contextlib.contextmanager
def alone_in(output: Path, found: list[Path]) -> Iterator[None]:
    """Hold a run's folder, which is made, on the first process for the length of a block; a collective.

    Args:
        output: the folder.
        found: its checkpoints when the run looked for the one to go on from.

    Raises:
        ArtifactError: another run has it, or had it since then; on all processes.
        OSError: the disk refuses; on all processes.
    """
    with contextlib.ExitStack() as held:
        on_first_process(lambda: _take(output, found, held))
        yield


def _take(output: Path, found: list[Path], held: contextlib.ExitStack) -> None:
    output.mkdir(parents=True, exist_ok=True)
    _await_sign_of_life(output)
    try:
        held.enter_context(FolderLock(output, "m3 pretrain"))
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        warn(f"{output}: cannot be locked on this file system; let no other run write there")
    if list_checkpoints(output) != found:
        raise ArtifactError(f"{output}: another run saved here meanwhile; run the same command again to go on from it")


def _await_sign_of_life(output: Path) -> None:
    """Wait until a lock that is there is renewed or ends: a requeued job may come before that of its dead node ends."""
    with contextlib.suppress(FileNotFoundError):
        owner = last = read_owner(output / NAME)
        if owner and not owner.is_gone():
            say(f"{output}: locked by {owner}; waiting for a sign of life from it")
        while last and last == owner and not last.is_gone() and time.time() < last.expires:
            time.sleep(0.5)
            last = read_owner(output / NAME)
