"""The device this process computes on, chosen once: CUDA where there is one, else the CPU.

torch is imported when the device is chosen: jobs that need none start without it.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_m3.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Where tensors live and how processes talk."""

    device: "torch.device"
    """Device of parameters and activations."""
    backend: str
    """torch.distributed backend: nccl or gloo."""

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"


def _refuse_unrelated_apex() -> None:
    """PyPI's ``apex`` is a web toolkit; NVIDIA's has ``apex.optimizers``."""
    found = importlib.util.find_spec("apex")
    if found is not None and importlib.util.find_spec("apex.optimizers") is None:
        raise UnsupportedError(
            "apex: the installed package is not NVIDIA's apex but an unrelated project of that name on PyPI; "
            "run `pip uninstall apex` (NVIDIA's is optional and built from its own source, see requirements-gpu.txt)"
        )


def local_gpu(local_rank: str, count: int) -> int:
    """The number of this process' GPU, by what a launcher put into LOCAL_RANK, of ``count`` that it sees.

    Raises:
        ConfigError: there is no such GPU.
    """
    if not local_rank.isdecimal() or int(local_rank) >= count:
        raise ConfigError(f"LOCAL_RANK={local_rank}: this process sees {count} GPUs; start at most as many processes "
                          "on a machine as it has GPUs, each of which sees all of them")
    return int(local_rank)


@functools.cache
def select() -> Platform:
    """Choose the platform of this process; call it before importing anything of megatron.core.

    With CUDA present nothing is patched, and the launcher's LOCAL_RANK names the GPU. Without it the stand-ins of
    :mod:`megatron_m3.platform.cpu` are installed.

    Raises:
        UnsupportedError: PyPI's unrelated ``apex`` is installed.
        ConfigError: LOCAL_RANK names a GPU that this process does not see.
    """
    import torch

    from megatron_m3.platform import cpu

    _refuse_unrelated_apex()
    for name in ("megatron", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=name)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # known and not for users: GPTModel's deprecation, and CUDA looked for by a build helper
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if torch.cuda.is_available():
        local_rank = local_gpu(os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count())
        torch.cuda.set_device(local_rank)
        return Platform(device=torch.device("cuda", local_rank), backend="nccl")
    cpu.install()
    return Platform(device=torch.device("cpu"), backend="gloo")


def count_gpus() -> int:
    """GPUs that this process may use; 0 where it computes on the CPU. Touches none of them."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.cache
def cuda_architecture() -> int | None:
    """Of this process' device: 90 is sm_90, H100; None on the CPU."""
    if not select().is_cuda:
        return None
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, str]:
    """The device, its backend, and the versions of the libraries that are installed (not which of them are used)."""
    import torch

    platform = select()
    name = torch.cuda.get_device_name(platform.device) if platform.is_cuda else "CPU"
    return {
        "device": name,
        "backend": platform.backend,
        "torch": torch.__version__,
        "megatron-core": _version("megatron-core") or "absent",
        "transformer-engine": _version("transformer-engine") or "absent",
        "dali": _version("nvidia-dali-cuda130") or "absent",
    }
