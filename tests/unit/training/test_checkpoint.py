import resource
import shutil

import pytest
import torch

from megatron_m3.errors import ArtifactError, M3Error
from megatron_m3.manifest import check_files, read_manifest
from megatron_m3.model.checkpoint import list_checkpoints, load_model, read_checkpoint, remove_checkpoint
from megatron_m3.platform.distributed import shut_down


@pytest.fixture(scope="module")
def trained(training_data, tmp_path_factory):
    """A run of two steps, with a checkpoint after each."""
    from megatron_m3.config import replace_fields
    from megatron_m3.training.loop import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    train(replace_fields(training_data.config(), {
        "training.output": str(folder), "training.steps": "2", "checkpoint.every": "1", "logging.tensorboard": "false",
        "logging.peak_tflops": "1", "training.stage": "continual"}))
    return folder


@pytest.fixture
def load():
    """load_model, which joins the world; it is left after the test."""
    yield load_model
    if torch.distributed.is_initialized():
        shut_down()


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained / "step_0000002", tmp_path / "step_0000002")


def test_checkpoint_names_what_it_is_made_of(trained, training_data):
    manifest = read_checkpoint(trained / "step_0000002")
    check_files(trained / "step_0000002", manifest, checksums=True)
    assert manifest.inputs == {
        name: read_manifest(getattr(training_data, name), name, 1).hash
        for name in ("tokenizer", "tokens", "references", "neighbours")
    }
    assert manifest.settings["step"] == 2
    assert manifest.settings["good"] is True
    assert manifest.settings["training"]["position"] == 8


def test_weights_change_with_every_step(trained):
    hashes = [read_checkpoint(folder).settings["weights_hash"] for folder in list_checkpoints(trained)]
    assert len(set(hashes)) == len(hashes) == 3


def test_load_model_gives_the_newest_of_a_run(trained, training_data, load):
    loaded = load(trained)
    assert loaded.weights_hash == read_checkpoint(trained / "step_0000002").settings["weights_hash"]
    assert loaded.tokenizer.hash == read_manifest(training_data.tokenizer, "tokenizer", 1).hash
    assert loaded.prefix_ids[0] == loaded.tokenizer.bos_id
    assert loaded.tokenizer.decode(loaded.prefix_ids) == "Reference:"
    assert loaded.config.training.stage == "continual"
    assert not loaded.model.training


def test_load_model_in_bf16_keeps_the_name_of_the_weights(trained, load):
    full, half = load(trained), load(trained, dtype="bf16")
    assert half.weights_hash == full.weights_hash
    for whole, rounded in zip(full.model.parameters(), half.model.parameters(), strict=True):
        assert torch.equal(whole.bfloat16(), rounded)


def test_flipped_bit_of_a_weight_is_refused(copied, load):
    weight = load(copied).model.decoder.layers[2].mlp.linear_fc2.weight
    path = next(copied.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    place = bytes(content).index(weight.detach().numpy().tobytes())
    content[place + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="step_0000002") as caught:
        load(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["*.distcp", ".metadata", "tokenizer/tokenizer.json"])
def test_missing_and_truncated_files_are_refused(copied, load, name):
    path = next(copied.glob(name))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=path.name):
        load(copied)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load(copied)


@pytest.mark.parametrize("name", ["*.distcp", ".metadata"])
def test_garbage_is_refused_in_one_line(copied, load, name):
    path = next(copied.glob(name))
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    with pytest.raises(ArtifactError) as caught:
        load(copied)
    assert "\n" not in str(caught.value)


def test_removing_the_link_to_a_checkpoint_leaves_what_it_points_to(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "step_0000001").symlink_to(tmp_path / "far")
    remove_checkpoint(tmp_path / "step_0000001")
    assert [path.name for path in tmp_path.iterdir()] == ["far"]


def test_unfinished_checkpoint_is_not_listed_and_not_loaded(copied, load):
    unfinished = copied.rename(copied.with_name(".step_0000002.tmp"))
    (unfinished / "manifest.json").unlink()
    assert list_checkpoints(unfinished.parent) == []
    with pytest.raises(ArtifactError, match="unfinished"):
        load(unfinished)


@pytest.mark.parametrize("limit", [10_000, 1_000_000])
def test_full_disk_is_one_line_and_leaves_nothing(run, tmp_path, limit):
    """A limit on file sizes stands in for the disk; the kernel refuses the write in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(M3Error, match=r"cannot save: .*free space") as caught:
            run(training__steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "run").iterdir() if "step" in path.name]


def test_disk_too_small_is_seen_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(M3Error, match="bytes needed, 1,000 free"):
        run(training__steps=1)
    assert not list((tmp_path / "run").glob("*step*"))
