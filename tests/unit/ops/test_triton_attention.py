"""The triton backend: its arithmetic under Triton's interpreter, and its kernels compiled for absent cards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention import get_backend
from megatron_m3.ops.memory_attention.triton_tiles import tiles_for
from tests.launcher import ROOT
from tests.unit.ops.compiled_kernels import SHAPES, SHARED_MEMORY, compile_kernel


@pytest.mark.parametrize("cases", ["triton_cases.py", "triton_training_cases.py"])
def test_kernels_equal_the_reference_under_the_interpreter(cases):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "pytest", Path(__file__).with_name(cases)], cwd=ROOT,
                          env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " skipped" not in done.stdout


@pytest.mark.parametrize(("kernel", "head_size", "dtype", "architecture"), SHAPES)
def test_kernels_fit_their_card(kernel, head_size, dtype, architecture):
    use = compile_kernel(kernel, head_size, dtype, architecture)
    assert use.spilled_bytes == 0
    assert use.shared_bytes <= SHARED_MEMORY[architecture]
    assert use.tensor_columns <= 512


def test_tensors_on_the_cpu_are_refused():
    tensors = [torch.zeros(1, 4, 2, 16) for _ in range(3)]
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET"):
        get_backend("triton").causal_attention(*tensors)


def test_a_card_without_tiles_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"no tiles for sm_89.*use torch"):
        tiles_for(torch.bfloat16, 89)


@pytest.mark.parametrize(("tokens", "heads"), [(700_000, 40), (70_000, 400)])
def test_a_sequence_beyond_32_bit_offsets_is_refused(tokens, heads):
    query = torch.empty(1, tokens, heads, 80, device="meta", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="32-bit offsets"):
        get_backend("triton").causal_attention(query, query[:, :, :8], query[:, :, :8])


def test_shapes_that_do_not_belong_together_are_noticed():
    query, key = torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16)
    band = {"prefix_length": 0, "chunk_length": 4, "window": 1}
    memory, valid = torch.zeros(1, 1, 2, 2, 16), torch.ones(1, 1, 2, dtype=torch.bool)
    attend = get_backend("triton").memory_attention
    with pytest.raises(AssertionError, match="keys and values"):
        attend(query, key, key[:, :3], memory, memory, valid, **band)
    with pytest.raises(AssertionError, match="memories of another shape"):
        attend(query, key, key, memory[..., :1, :], memory[..., :1, :], valid, **band)


def test_the_package_works_where_triton_cannot_be_imported():
    code = """
import sys
import torch
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, NoTriton())
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention import get_backend
from megatron_m3.ops.memory_attention.triton_tiles import tiles_for
tensors = [torch.zeros(1, 4, 2, 16) for _ in range(3)]
get_backend("torch").causal_attention(*tensors)
try:
    get_backend("triton").causal_attention(*tensors)
except UnsupportedError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert "model.attention=triton: Triton cannot be imported (no triton here); use torch" in done.stdout


def test_importing_the_operations_does_not_import_the_kernels():
    code = "import sys, megatron_m3.ops.memory_attention; print([name for name in sys.modules if 'triton_' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert "triton_forward" not in done.stdout
