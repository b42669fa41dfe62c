"""The trellis' search on a CUDA device: see :mod:`megatron_m3.ops.codec.trellis`.

Letters as there.
"""

import functools
import itertools
from types import ModuleType

import torch
from torch import Tensor

from megatron_m3.ops.codec.trellis import MAX_BITS, STATE_BITS, STATES
from megatron_m3.ops.triton_support import load_kernels, need_device

PROGRAMS = 4096
"""Sequences searched at a time; each has 32 bytes of device memory for every number."""
WHO = "codec KLT"
INSTEAD = "encode on the CPU"


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernel."""
    return load_kernels("megatron_m3.ops.codec.triton_trellis_kernel", WHO, INSTEAD)


def launch_options() -> dict[str, int | bool]:
    """Arguments that are compiled into the kernel, and how it is launched.

    Squares are rounded before they are added, as elsewhere: sums beyond 2**24 have the same bits too.
    """
    return {"STATE_BITS": STATE_BITS, "MAX_BITS": MAX_BITS, "num_warps": 1, "enable_fp_fusion": False}


def search(numbers_TN: Tensor, tables_TS: Tensor, bits: list[int]) -> Tensor:
    """See :func:`megatron_m3.ops.codec.trellis.search`: the same states, ties too.

    Thousands of sequences keep a device busy.

    Raises:
        UnsupportedError: neither a CUDA device with Triton nor Triton's interpreter.
    """
    module = kernels()
    need_device(numbers_TN, WHO, INSTEAD)
    T, N = numbers_TN.shape
    assert tables_TS.shape == (T, STATES), "tables of other states"
    assert len(bits) == T, "bits of other numbers"
    device = numbers_TN.device
    states_NT = torch.empty(N, T, dtype=torch.int16, device=device)
    if not states_NT.numel():
        return states_NT.T.long()
    choices = torch.empty(min(N, PROGRAMS), T, module.WORDS.value, dtype=torch.int32, device=device)
    bits_T, runs = (torch.tensor(one, dtype=torch.int32, device=device) for one in (bits, _runs(bits)))
    numbers_NT, tables_TS = numbers_TN.T.contiguous().float(), tables_TS.contiguous().float()
    with torch.cuda.device_of(numbers_TN):
        for numbers, states in zip(numbers_NT.split(PROGRAMS), states_NT.split(PROGRAMS), strict=True):
            module.search_kernel[(len(numbers),)](
                numbers, tables_TS, runs, bits_T, choices, states, T, len(runs), **launch_options())
    return states_NT.T.long()


def _runs(bits: list[int]) -> list[tuple[int, int, int]]:
    """Numbers that follow each other with equally many bits: the bits, the first, and the one after the last."""
    counts = [(count, len(list(same))) for count, same in itertools.groupby(bits)]
    ends = list(itertools.accumulate((length for _, length in counts), initial=0))
    return [(count, first, last) for (count, _), first, last in zip(counts, ends[:-1], ends[1:], strict=True)]
