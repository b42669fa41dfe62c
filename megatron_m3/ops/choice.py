"""Which backend computes attention where the user leaves it open, and which kernels go with an attention backend."""

import functools
from typing import NamedTuple

from megatron_m3.config.model import ModelConfig
from megatron_m3.errors import UnsupportedError
from megatron_m3.platform import cuda_architecture


class Choice(NamedTuple):
    """A backend, and why it is that."""

    name: str
    why: str
    """Empty where the user named it."""

    def __str__(self) -> str:
        return f"{self.name} (auto: {self.why})" if self.why else self.name


def choose_backend(model: ModelConfig) -> Choice:
    """``model.attention``, or for auto the quickest that this process' device can run: triton on CUDA, else torch.

    Never te: merging a library's trunk with the memories takes longer than the whole Triton pass, see docs/results.md.
    """
    if model.attention != "auto":
        return Choice(model.attention, "")
    return decide(cuda_architecture(), model.head_size)


@functools.cache
def decide(architecture: int | None, head_size: int) -> Choice:
    """The backend for a card of ``architecture`` (90 is H100), or None for the CPU."""
    import torch

    from megatron_m3.ops.memory_attention import triton_backend, triton_tiles

    if architecture is None:
        return Choice("torch", "no CUDA device")
    if head_size > triton_backend.LARGEST_HEAD:
        return Choice("torch", f"triton takes heads of up to {triton_backend.LARGEST_HEAD}")
    try:
        triton_backend.kernels()
        triton_tiles.tiles_for(torch.bfloat16, architecture)
    except UnsupportedError as error:
        return Choice("torch", str(error))
    return Choice("triton", f"CUDA sm_{architecture}")


def takes_triton(attention: str, head_size: int) -> bool:
    """Whether RoPE and the selection of tokens use their Triton kernels beside the attention backend ``attention``.

    They do beside triton, and beside te on cards where auto is triton; torch and reference do without Triton.
    """
    if attention == "te":
        return decide(cuda_architecture(), head_size).name == "triton"
    return attention == "triton"
