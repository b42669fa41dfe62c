"""Kernels for the CPU that numba compiles at their first use."""

from collections.abc import Callable
from typing import Any


def compile_kernel(signature: Any, function: Callable[..., None], *, keep: bool = True) -> Callable[..., None]:
    """``function`` compiled for one signature, without the interpreter's lock while it runs.

    With ``keep`` the code is kept in ``__pycache__`` beside the function's file, else in the user's cache folder, or
    where NUMBA_CACHE_DIR says; where none can be written it is compiled anew in every process. Of the signatures of one
    function only one is to be kept: numba's cache may mix up two that are written at the same time.
    """
    from numba import njit

    if keep:
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except Exception:  # no folder for the cache, a full disk, a damaged file: compiling needs none of them
            pass
    return njit(signature, nogil=True)(function)


def aligned_zeros(size: int, dtype: Any) -> Any:
    """Zeros [size] that begin with a cache line, without which vectors of the widest kind take longer."""
    import numpy as np

    dtype = np.dtype(dtype)
    raw = np.zeros(size * dtype.itemsize + 64, np.uint8)
    first = -raw.__array_interface__["data"][0] % 64
    return raw[first : first + size * dtype.itemsize].view(dtype)
