"""Kernels of the codec and of selection: under Triton's interpreter, and compiled for absent cards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_m3.errors import UnsupportedError
from tests.launcher import ROOT
from tests.unit.ops.compiled_kernels import OTHER_SHAPES, SHARED_MEMORY, compile_other


def test_kernels_equal_their_plain_versions_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    cases = Path(__file__).with_name("triton_kernel_cases.py")
    done = subprocess.run([sys.executable, "-m", "pytest", str(cases)], cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " skipped" not in done.stdout


@pytest.mark.parametrize(("kernel", "head_size", "dtype", "architecture"), OTHER_SHAPES)
def test_kernels_fit_their_card(kernel, head_size, dtype, architecture):
    use = compile_other(kernel, head_size, dtype, architecture)
    assert use.spilled_bytes == 0
    assert use.shared_bytes <= SHARED_MEMORY[architecture]
    assert use.tensor_columns <= 512


def test_tensors_on_the_cpu_are_refused():
    from megatron_m3.model.rope import Rope
    from megatron_m3.ops.codec import triton_trellis
    from megatron_m3.ops.rope import rotate
    from megatron_m3.ops.select_tokens import select_tokens

    query = torch.zeros(1, 4, 2, 16)
    with pytest.raises(UnsupportedError, match=r"=triton: select_tokens: .*TRITON_INTERPRET.*use torch"):
        select_tokens(query, query, torch.tensor([4]), 2, backend="triton")
    with pytest.raises(UnsupportedError, match=r"codec KLT: .*TRITON_INTERPRET.*on the CPU"):
        triton_trellis.search(torch.zeros(1, 2), torch.zeros(1, 512), [1])
    with pytest.raises(UnsupportedError, match=r"=triton: RoPE: .*TRITON_INTERPRET.*use torch"):
        rotate(query, Rope(16, 1e4).table(torch.arange(4)[None], torch.float32), "triton")


def test_too_large_a_head_is_refused_by_name():
    from megatron_m3.ops.codec.transform import TransformCode
    from megatron_m3.ops.codec.triton_decode import SlotDecoder

    vectors = torch.zeros(1, 4, 516)
    code = TransformCode.train(vectors, torch.eye(516)[None], torch.zeros(1).long(), 2)
    with pytest.raises(UnsupportedError, match=r"model\.head_size=258"):
        SlotDecoder(code, torch.ones(129).double(), torch.ones(1, 1).bool(), slice(None), 8, "cpu")
