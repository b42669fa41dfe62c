"""What Triton backends share: kernels that are imported when they are first needed, and tensors that these can take."""

import functools
import importlib
import subprocess
from types import ModuleType

from torch import Tensor

from megatron_m3.errors import UnsupportedError

PROBE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "m3_probe"};
PyMODINIT_FUNC PyInit_m3_probe(void) { return PyModule_Create(&module); }
"""
"""The least module in C; Triton compiles a greater one, which launches kernels, and keeps both in its cache."""


def load_kernels(module: str, who: str, instead: str) -> ModuleType:
    """Import a module of kernels.

    Args:
        module: its full name.
        who: what a user asked for that needs it, in errors.
        instead: what would do without it.

    Raises:
        UnsupportedError: there is no Triton, or it cannot compile what launches kernels.
    """
    try:
        kernels = importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(f"{who}: Triton cannot be imported ({error}); {instead}") from None
    if fault := compiler_fault():
        raise UnsupportedError(f"{who}: Triton compiles in C what launches kernels, and cannot ({fault}); install gcc "
                               f"and Python's headers, or set CC to a C compiler; or {instead}")
    return kernels


@functools.cache
def compiler_fault() -> str:
    """Why Triton cannot compile and load a module in C, found by letting it; empty where it can, or interprets."""
    try:
        import triton
        from triton.runtime.build import compile_module_from_src

        if not triton.knobs.runtime.interpret:
            compile_module_from_src(PROBE, "m3_probe")
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} ended with status {error.returncode}"
    except (RuntimeError, OSError, ImportError) as error:
        return str(error).partition(". ")[0].rstrip(".")
    return ""


def need_device(tensor: Tensor, who: str, instead: str) -> None:
    """Refuse tensors that kernels cannot run on; Triton must be there.

    Raises:
        UnsupportedError: neither a CUDA device nor Triton's interpreter.
    """
    import triton

    if not (tensor.is_cuda or triton.knobs.runtime.interpret):
        raise UnsupportedError(
            f"{who}: tensors on {tensor.device.type}; the kernels need a CUDA device, or TRITON_INTERPRET=1 in the "
            f"environment; {instead}"
        )
