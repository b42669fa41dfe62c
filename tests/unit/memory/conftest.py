"""One process's world, a tiny model and a knowledge base for the memory tests."""

import pytest

from tests.knowledge import build_knowledge
from tests.tiny_model import joined_world, tiny_model


@pytest.fixture(autouse=True, scope="module")
def world():
    with joined_world():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def loaded(folder, world):
    return tiny_model(folder, memory__layers="0,2")


@pytest.fixture(scope="module")
def references(folder, loaded):
    from megatron_m3.references import ReferenceStore

    paths = build_knowledge(folder, folder / "tokenizer", count=400, words=7, reference_length=16)
    return ReferenceStore.open(paths["references"])


@pytest.fixture(scope="module")
def memories(loaded, references):
    """All references' memories, straight from the model."""
    from megatron_m3.memory import encode_references

    return encode_references(loaded, *references.tokens(range(len(references))))
