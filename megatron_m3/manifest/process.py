"""What files on a shared disk call a process, and whether it still runs.

A process number says little by itself: hosts may bear one name, and containers of one host count their processes apart.
"""

import contextlib
import functools
import hashlib
import os
from pathlib import Path


def machine() -> str:
    """What tells whether a process number means the same process: the system's start and its space of processes."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


@functools.cache
def place() -> str:
    """This host and its :func:`machine`, short enough for the name of a file."""
    return f"{os.uname().nodename}-{hashlib.sha256(machine().encode()).hexdigest()[:8]}"


def is_running(pid: int) -> bool:
    """Whether there is a process of this number in this :func:`place`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
