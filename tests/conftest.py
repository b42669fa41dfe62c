"""One thread for every library, set before any of them is imported."""

import os
import sys

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ[name] = "1" if name != "TOKENIZERS_PARALLELISM" else "false"


@pytest.fixture(autouse=True, scope="module")
def leave_no_world():
    """Each file of tests starts without process groups, whatever the one before left."""
    yield
    if "megatron.core" in sys.modules:
        from megatron_m3.platform.distributed import shut_down

        shut_down()
