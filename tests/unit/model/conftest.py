"""One process's world for the model tests."""

import pytest

from tests.tiny_model import joined_world


@pytest.fixture(autouse=True, scope="module")
def world():
    with joined_world():
        yield
