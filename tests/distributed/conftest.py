"""What tests of bank builds share: they take seconds to make."""

import pytest

from tests.bank_jobs import JOB, build, make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A checkpoint and a knowledge base."""
    folder = tmp_path_factory.mktemp("bank_build")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def built(inputs):
    """A bank built by one rank, undisturbed."""
    build(inputs, inputs / "one", 1, *JOB)
    return inputs / "one"
