import pytest

from tests.small_data import make_small_data


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return make_small_data(tmp_path_factory.mktemp("small"))
