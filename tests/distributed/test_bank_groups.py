"""Bank builds by tensor-parallel groups of ranks: any number of groups gives the same bytes."""

import pytest
import torch

from megatron_m3.errors import ArtifactError, ConfigError
from tests.bank_jobs import build, build_here, digest

JOB = ("block-size", "40", "codec", "KLT20", "codec-sample", "300")


@pytest.fixture(scope="module")
def pair(inputs):
    """A bank of one group of two ranks."""
    build(inputs, inputs / "pair", 2, *JOB, "tensor-parallel", "2")
    return inputs / "pair"


def test_two_groups_of_two_write_the_bytes_of_one(inputs, pair, tmp_path):
    build(inputs, tmp_path / "bank", 4, *JOB, "tensor-parallel", "2")
    assert digest(tmp_path / "bank") == digest(pair)


def test_a_group_keeps_the_tokens_and_nearly_the_numbers_of_one_rank(inputs, pair, tmp_path):
    from megatron_m3.memory import MemoryBank

    build_here(inputs, tmp_path / "bank", *JOB)
    one, two = (MemoryBank.open(folder) for folder in (tmp_path / "bank", pair))
    first, second = (bank.read(range(len(bank))) for bank in (one, two))
    assert torch.equal(first.positions, second.positions)
    error = (first.kv - second.kv).square().sum() / first.kv.square().sum()
    print(f"relative squared error {error:.2g}")
    assert error < 1e-3  # last bits decide here and there which of two nearly equal codes is taken


def test_the_bank_of_a_group_is_another_job(inputs, pair):
    before = digest(pair)
    with pytest.raises(ArtifactError, match="made from other inputs or settings"):
        build_here(inputs, pair, *JOB)
    assert digest(pair) == before


def test_ranks_that_make_no_whole_groups_are_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match="tensor_parallel=2: 1 ranks do not make groups of 2"):
        build_here(inputs, tmp_path / "bank", *JOB, "tensor-parallel", "2")
    assert not (tmp_path / "bank").exists()
