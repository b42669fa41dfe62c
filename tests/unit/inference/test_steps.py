"""Steps by Triton's kernels and as CUDA graphs: what can be shown without a card."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_m3.errors import UnsupportedError
from tests.launcher import ROOT


def test_kernels_and_repeated_steps_generate_what_torch_does():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cases = Path(__file__).with_name("triton_generation_cases.py")
    done = subprocess.run([sys.executable, "-m", "pytest", str(cases)], cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " skipped" not in done.stdout


@pytest.mark.parametrize(("device", "attention", "tensor", "told"), [
    ("cpu", "auto", 1, "cuda_graphs: the model is on cpu; leave --cuda-graphs away"),
    ("cuda", "triton", 2, "cuda_graphs: parallel.tensor=2"),
    ("cuda", "torch", 1, "cuda_graphs: model.attention=torch; they need triton"),
])
def test_what_is_no_graph_is_refused_by_name(device, attention, tensor, told):
    from megatron_m3.config import get_recipe
    from megatron_m3.inference.steps import check_graphs

    config = get_recipe("tiny")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention),
                                 parallel=dataclasses.replace(config.parallel, tensor=tensor))
    with pytest.raises(UnsupportedError, match=told):
        check_graphs(config, torch.device(device))
