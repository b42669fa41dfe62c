"""Stand-ins with which megatron-core runs on the CPU: every place where it takes CUDA for granted, in one file.

They are installed only where CUDA is absent, before anything of megatron.core is imported.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "zeros_like",
              "ones_like", "empty_like", "full_like", "randint", "empty_strided")


class _Stream:
    """A CUDA stream or event where work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_Stream":
        return _Stream()


def _is_cuda(argument: Any) -> bool:
    return isinstance(argument, str | torch.device) and str(argument).startswith("cuda")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with device="cuda" read as the CPU."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return wrapped


def _nothing() -> Callable[..., None]:
    """A new function that does nothing (torch's compiler wants every stand-in to be an object of its own)."""
    return lambda *args, **kwargs: None


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Leave functions that would be compiled for the GPU as they are."""
    compile_function = torch.compile
    torch.compile = lambda function=None, **kwargs: function or (lambda f: f)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _stand_in_for_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    for name in ("synchronize", "_lazy_init", "empty_cache", "set_device"):
        setattr(cuda, name, _nothing())
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = cuda.device = lambda *args, **kwargs: contextlib.nullcontext()


def _stand_in_for_cuda_tensors() -> None:
    """Rewrite devices where tensors are made; functions that only compute are left as they are, and as fast."""
    # torch remembers its own factories here, else `with torch.device(...)`, by which transformers loads, misses them
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    plain_type, plain_to, to_on_cpu = tensor.type, tensor.to, _on_cpu(tensor.to)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # a change of type alone, which generation makes a hundred times a token
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype):
            return plain_to(self, args[0])
        return to_on_cpu(self, *(_CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        # megatron-core sorts gradients into buckets by names such as torch.cuda.FloatTensor
        name = plain_type(self)
        return name.replace("torch.", "torch.cuda.") if self.is_floating_point() else name

    tensor.to, tensor.type = to, type_of


def install() -> None:
    """Install the stand-ins; megatron.core must not have been imported yet.

    Transformer Engine and NVIDIA's apex are hidden, if present: megatron-core would take their CUDA-only optimizers.
    """
    if "megatron.core" in sys.modules:
        raise AssertionError("platform.select() must come before the first import of megatron.core")
    for name in ("transformer_engine", "apex", "amp_C"):
        sys.modules[name] = None  # type: ignore[assignment]
    _stand_in_for_torch_cuda()
    _stand_in_for_cuda_tensors()
    with _eager():
        import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
