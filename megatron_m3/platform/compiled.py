"""Kernels for the CPU that numba compiles at their first use."""

import zlib
from collections.abc import Callable
from types import FunctionType
from typing import Any


def compile_kernel(signature: Any, function: Callable[..., None]) -> Callable[..., None]:
    """``function`` compiled for one signature, without the interpreter's lock while it runs.

    The code is kept in ``__pycache__`` beside the function's file, else in the user's cache folder, or where
    NUMBA_CACHE_DIR says; where none can be written it is compiled anew in every process. Each signature has a name of
    its own there: numba's cache may mix up two of one function that are written at the same time.
    """
    from numba import njit

    named = FunctionType(function.__code__, function.__globals__)
    named.__qualname__ = f"{function.__qualname__}_{zlib.crc32(str(signature).encode()):08x}"
    try:
        return njit(signature, nogil=True, cache=True)(named)
    except Exception:  # no folder for the cache, a full disk, a damaged file: compiling needs none of them
        return njit(signature, nogil=True)(named)


def aligned_zeros(size: int, dtype: Any) -> Any:
    """Zeros [size] that begin with a cache line, without which vectors of the widest kind take longer."""
    import numpy as np

    dtype = np.dtype(dtype)
    raw = np.zeros(size * dtype.itemsize + 64, np.uint8)
    first = -raw.__array_interface__["data"][0] % 64
    return raw[first : first + size * dtype.itemsize].view(dtype)
