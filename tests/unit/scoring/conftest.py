"""One process's world for the scoring tests."""

import pytest
import torch

from megatron_m3.config import ParallelConfig
from megatron_m3.platform.distributed import initialize_parallel, shut_down


@pytest.fixture(autouse=True, scope="package")
def world():
    torch.set_num_threads(1)
    yield initialize_parallel(ParallelConfig(), seed=1)
    shut_down()
