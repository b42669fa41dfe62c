"""The exceptions a user can cause, and how a command turns them into one line and exit status 2."""

import errno
import os
import sys
from collections.abc import Callable

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Disk full, quota used up, file size limit reached."""


class M3Error(Exception):
    """A mistake the user can mend: the message names the field or file, and the mend."""


class ConfigError(M3Error):
    """A setting that cannot work, alone or together with another."""


class DataError(M3Error):
    """A text, token, reference or neighbour file that is missing, broken, or made from something else."""


class ArtifactError(M3Error):
    """An artifact on disk whose manifest, checksum or origin does not fit."""


class UnsupportedError(M3Error):
    """A feature that this system refuses by name."""


class ToldError(M3Error):
    """An error of a job of many processes that another process tells the user of."""


def user_message(error: BaseException) -> str | None:
    """The one line that tells a user of ``error``; None where the error is not the user's but ours."""
    if isinstance(error, M3Error):
        return str(error)
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in NO_SPACE:
        return f"{error.filename or 'output'}: {error.strerror}; free space or choose another folder"
    return f"{error.filename}: {error.strerror}" if error.filename is not None else None


def warn(message: str) -> None:
    """One line on stderr, from the first process of a job, of what works but is hardly meant."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def exit_on_user_error[T](main: Callable[[], T]) -> T:
    """Run ``main``; an :class:`M3Error` or a full disk becomes one line on stderr and exit status 2."""
    try:
        return main()
    except KeyboardInterrupt:
        message: str | None = "interrupted"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (M3Error, OSError) as error:
        message = user_message(error)
        if message is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
