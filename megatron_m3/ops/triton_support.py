"""What Triton backends share: kernels that are imported when they are first needed, and tensors that these can take."""

import importlib
from types import ModuleType

from torch import Tensor

from megatron_m3.errors import UnsupportedError


def load_kernels(module: str, who: str, instead: str) -> ModuleType:
    """Import a module of kernels.

    Args:
        module: its full name.
        who: what a user asked for that needs it, in errors.
        instead: what would do without it.

    Raises:
        UnsupportedError: there is no Triton.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(f"{who}: Triton cannot be imported ({error}); {instead}") from None


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
