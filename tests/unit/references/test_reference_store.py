import shutil

import numpy as np
import pytest

from megatron_m3.errors import ArtifactError, DataError
from megatron_m3.manifest import BlockFolder, Manifest, block_name, write_manifest
from megatron_m3.references import ReferenceStore, arrays_of_block

LENGTH, BLOCK = 6, 4
REFERENCES = [(f"text {number} é", [number + 1] * (number % LENGTH + 1), f"document {number // 3}", number)
              for number in range(10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references") / "made"
    blocks = BlockFolder(folder, {"a": 1})
    for index in range(3):
        blocks.write(index, arrays_of_block(REFERENCES[index * BLOCK : (index + 1) * BLOCK], LENGTH, 70000))
    write_manifest(folder, Manifest(kind="references", schema=1, inputs={"tokenizer": "t"}, files=blocks.files(3),
                                    settings={"reference_length": LENGTH, "block_size": BLOCK}))
    return folder


def test_every_reference_reads_back(made):
    store = ReferenceStore.open(made, check=True)
    assert (len(store), store.num_blocks, store.tokenizer_hash) == (10, 3, "t")
    for number, (text, tokens, document, first) in enumerate(REFERENCES):
        assert (store.text(number), store.source(number)) == (text, (document, first))
        found, lengths = store.tokens([number])
        assert found.dtype == lengths.dtype == np.int32
        assert found[0].tolist() == tokens + [0] * (LENGTH - len(tokens))
        assert lengths.tolist() == [len(tokens)]


def test_many_ids_in_any_order_and_repeated(made):
    store = ReferenceStore.open(made)
    ids = np.array([9, 0, 4, 4, 3, 8, 0])
    tokens, lengths = store.tokens(ids)
    for row, number in enumerate(ids):
        assert tokens[row, : lengths[row]].tolist() == REFERENCES[number][1]
    assert store.tokens([])[0].shape == (0, LENGTH)
    assert store.texts([2, 1]) == [REFERENCES[2][0], REFERENCES[1][0]]


@pytest.mark.parametrize("number", [-1, 10])
def test_an_id_that_no_reference_has_is_refused(made, number):
    store = ReferenceStore.open(made)
    for read in (store.text, store.source, lambda one: store.tokens([0, one])):
        with pytest.raises(DataError, match=f"reference {number} is not in 0-9"):
            read(number)


def test_ids_above_16_bits_are_kept(tmp_path):
    arrays = arrays_of_block([("a", [69999], "d", 0)], LENGTH, 70000)
    assert arrays["tokens"][0, 0] == 69999


def test_another_tokenizer_is_refused(made):
    with pytest.raises(ArtifactError, match="made from another tokenizer"):
        ReferenceStore.open(made, tokenizer_hash="u")


def test_damage_is_refused(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    path = folder / block_name(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"block_000001.*checksum"):
        ReferenceStore.open(folder, check=True)
    store = ReferenceStore.open(folder)
    assert store.text(0) == REFERENCES[0][0]
    for read in (store.text, store.source, lambda one: store.tokens([0, one])):
        with pytest.raises(ArtifactError, match=r"block_000001.*checksum"):
            read(BLOCK)
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"block_000001.*bytes, the manifest says"):
        ReferenceStore.open(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"block_000001.*missing"):
        ReferenceStore.open(folder)


def test_reading_is_memory_mapped_and_read_only(made):
    block = ReferenceStore.open(made)._blocks[0]
    with pytest.raises(ValueError, match="read-only"):
        block["tokens"][0, 0] = 1
