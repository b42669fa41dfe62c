"""One thread for every library and no CUDA device, set before any of them is imported."""

import os
import sys

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ[name] = "1" if name != "TOKENIZERS_PARALLELISM" else "false"


def pytest_configure(config):
    """Tests compute on the CPU, whatever the machine has, but for ``pytest -m gpu``."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="module")
def leave_no_world():
    """Each file of tests starts without process groups, whatever the one before left."""
    yield
    if "megatron.core" in sys.modules:
        from megatron_m3.platform.distributed import shut_down

        shut_down()
