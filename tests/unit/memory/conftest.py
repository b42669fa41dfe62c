"""One process's world, a tiny model and a knowledge base for the memory tests."""

import shutil
from dataclasses import replace

import pytest

from tests.edited_banks import texts, update
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


@pytest.fixture(scope="module")
def run(folder, loaded):
    """The tiny model's checkpoint."""
    from megatron_m3.model.checkpoint import save_checkpoint

    data = replace(loaded.config.data, tokenizer=str(folder / "tokenizer"))
    save_checkpoint(folder / "run", 1, [loaded.model], replace(loaded.config, data=data))
    return folder / "run"


@pytest.fixture(scope="module")
def edit(folder):
    """Edit a knowledge base: edit(base, name, *options) -> its folder."""
    from data_tools.edit_references import main

    def edit(base, name, *options):
        words = [str(word) for word in options]
        words += ["--tokenizer", str(folder / "tokenizer")] if {"--add", "--replace"} & set(words) else []
        main(["--references", str(base), "--output", str(folder / name), *words])
        return folder / name

    return edit


@pytest.fixture(scope="module")
def edited(folder, references, edit):
    """The knowledge base with references replaced, deleted and added, in two steps."""
    first = edit(references.folder, "R1", "--replace", "5,9,200", "--by", texts(folder / "by.jsonl", 3, 5000))
    return edit(first, "R2", "--delete", "3,7,399", "--add", texts(folder / "add.jsonl", 30, 6000))


@pytest.fixture(scope="module")
def build(run):
    """Build a bank: build(references, output, *options) -> its folder."""
    from launch.build_bank import main

    def build(references, output, *options):
        main(["--checkpoint", str(run), "--references", str(references), "--output", str(output), "--block-size", "64",
              *map(str, options)])
        return output

    return build


@pytest.fixture(scope="module")
def built(folder, references, build):
    """A bank of the knowledge base before it was edited, of each codec."""
    build(references.folder, folder / "none", "--codec", "none")
    build(references.folder, folder / "coded", "--codec", "KLT6")
    return folder


@pytest.fixture(scope="module")
def updated(built, edited, run):
    """The same banks after an update."""
    for codec in ("none", "coded"):
        shutil.copytree(built / codec, built / f"updated_{codec}")
        update(built / f"updated_{codec}", edited, run)
    return built
