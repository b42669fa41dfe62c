import dataclasses
import json
import shutil
from contextlib import ExitStack

import pytest
import torch

from data_tools import tokenize
from launch.pretrain import parse_config
from megatron_m3.config import from_dict
from megatron_m3.config.flops import step_flops
from megatron_m3.config.schema import Config
from megatron_m3.data import TokenStore
from megatron_m3.errors import ArtifactError, ConfigError, M3Error
from megatron_m3.manifest import read_manifest
from megatron_m3.manifest.lock import FolderLock, Owner
from megatron_m3.references import ReferenceStore
from megatron_m3.tokenizer import Tokenizer
from tests.small_data import SmallData, write_neighbours
from tests.tiny_model import joined_world, tiny_config

WILD = {"optimizer__lr": 30, "schedule__style": "constant", "schedule__warmup_fraction": 0, "training__steps": 8,
        "checkpoint__every": 1, "checkpoint__keep": 0, "guard__min_history": 1, "guard__spike_steps": 2}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".step", "step")))


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_run_leaves_checkpoints_settings_and_environment(run, tmp_path, capsys):
    summary, records = run(training__steps=5, checkpoint__every=2, checkpoint__keep=2)
    folder = tmp_path / "run"
    assert (summary.finished, summary.step, summary.checkpoint) == (True, 5, folder / "step_0000005")
    assert names(folder) == ["step_0000004", "step_0000005"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["sequences"] for record in records] == [4, 8, 12, 16, 20]
    stored = from_dict(Config, json.loads((folder / "config.json").read_text()))
    assert stored.training.steps == 5
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["optimizer"] == "torch.optim.adamw.AdamW"
    assert environment["attention"] == "torch (auto: no CUDA device)"
    assert environment["layout"]["tensor"] == 1
    shown = capsys.readouterr().err
    assert "optimizer torch.optim.adamw.AdamW, norm megatron_m3.model.layers.RMSNorm, attention torch (auto" in shown
    assert "step 5/5 100%" in shown


def test_start_line_names_the_attention_and_optimizer_in_use(run, tmp_path, capsys, monkeypatch):
    from megatron_m3.training import loop

    def build(*arguments):
        machinery = build_machinery(*arguments)
        [part] = machinery.optimizer.chained_optimizers
        part.optimizer.__class__ = type("OtherAdam", (type(part.optimizer),), {"__module__": "elsewhere"})
        return machinery

    build_machinery = loop.build_machinery
    monkeypatch.setattr(loop, "build_machinery", build)
    run(training__steps=1, model__attention="reference")
    shown = capsys.readouterr().err
    assert "optimizer elsewhere.OtherAdam, norm megatron_m3.model.layers.RMSNorm, attention reference\n" in shown


def test_finished_run_is_left_as_it_is(run):
    run(training__steps=2)
    summary, records = run(training__steps=2)
    assert (summary.finished, summary.loss, len(records)) == (True, None, 2)


def test_time_left_leaves_out_the_first_step_and_mfu_a_prefix_that_is_not_there(run):
    _, records = run(training__steps=4)
    second = records[1]
    assert second["seconds_left"] == pytest.approx(2 * second["seconds"])
    assert records[2]["seconds_left"] == pytest.approx((second["seconds"] + records[2]["seconds"]) / 2)
    flops = step_flops(tiny_config(training__global_batch="4")).total
    assert second["mfu"] * second["seconds"] * 1e12 == pytest.approx(flops)


def test_mfu_counts_the_tokens_that_are_kept_in_a_step(run):
    options = {"training__steps": 2, "training__stage": "continual"}
    plain, falling = (run(name, **options, memory__curriculum=share)[1] for name, share in (("one", 0), ("two", 0.5)))
    work = [[record["mfu"] * record["seconds"] for record in records] for records in (plain, falling)]
    assert work[0][0] * 1.01 < work[1][0], "all tokens are kept in the first of the steps"
    assert work[0][1] == pytest.approx(work[1][1])


def test_two_runs_at_once_are_refused_and_a_dead_one_is_waited_for(run, tmp_path):
    run(training__steps=1)
    with FolderLock(tmp_path / "run", "the other run", lease=0.6):
        before = contents(tmp_path / "run").keys()
        with pytest.raises(ArtifactError, match=r"locked by `the other run`.*; wait for it"):
            run(training__steps=2)
        assert contents(tmp_path / "run").keys() == before
    owner = Owner.me("a dead node's", 1.0)
    (tmp_path / "run" / "lock.json").write_text(
        json.dumps(dataclasses.asdict(owner) | {"host": "elsewhere", "expires_utc": ""}))
    summary, _ = run(training__steps=2)
    assert summary.finished
    assert not (tmp_path / "run" / "lock.json").exists()


def test_a_run_that_another_overtook_is_refused(run, tmp_path):
    from megatron_m3.training.alone import alone_in

    run(training__steps=1)
    with joined_world(), pytest.raises(ArtifactError, match="another run saved here meanwhile"), ExitStack() as stack:
        stack.enter_context(alone_in(tmp_path / "run", []))


def test_what_a_run_left_whose_checkpoints_are_gone_is_forgotten(run, tmp_path):
    run(**WILD, guard__lr_factor=0.001)
    for folder in (tmp_path / "run").glob("step_*"):
        shutil.rmtree(folder)
    run(training__steps=1)
    _, records = run(training__steps=2)
    assert [record["step"] for record in records] == [1, 2]
    guard = read_manifest(tmp_path / "run" / "step_0000002", "checkpoint", 1).settings["training"]["guard"]
    assert (guard["rollbacks"], guard["skipped"]) == (0, [])


def test_longer_run_goes_on_from_the_finished_one(run):
    run(training__steps=2)
    summary, records = run(training__steps=4)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert summary.step == 4


def test_training_learns(run):
    _, records = run(training__steps=30, optimizer__lr=0.01, checkpoint__every=30)
    assert records[-1]["loss"] < records[0]["loss"] - 1


def test_continual_starts_from_warmup_weights(run, tmp_path):
    run("warmup", training__steps=2)
    run("continual", training__steps=1, training__stage="continual", training__init_from=tmp_path / "warmup",
        checkpoint__every=1, checkpoint__keep=0)
    warm = read_manifest(tmp_path / "warmup" / "step_0000002", "checkpoint", 1).settings
    begun = read_manifest(tmp_path / "continual" / "step_0000000", "checkpoint", 1).settings
    assert begun["weights_hash"] == warm["weights_hash"]
    assert begun["training"]["position"] == 0


@pytest.mark.parametrize(("first", "second"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_starts_from_weights_of_another_dtype(run, tmp_path, first, second):
    from megatron_m3.model.checkpoint import load_model

    run("first", training__steps=1, training__dtype=first)
    run("second", training__steps=1, training__dtype=second, training__init_from=tmp_path / "first")
    with joined_world():
        given, taken = (load_model(tmp_path / name, dtype=second).model.state_dict()
                        for name in ("first/step_0000001", "second/step_0000000"))
    assert all(torch.equal(value, taken[name]) for name, value in given.items() if torch.is_tensor(value))


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_layers_stay_as_they_are(run, tmp_path, tied):
    from megatron_m3.model.checkpoint import load_model

    run(training__steps=2, training__frozen_layers=2, checkpoint__every=2, checkpoint__keep=0,
        model__tie_embeddings=tied)
    with joined_world():
        before, after = (load_model(tmp_path / "run" / name).model.state_dict()
                         for name in ("step_0000000", "step_0000002"))
        same = {name for name, value in before.items() if torch.is_tensor(value) and torch.equal(value, after[name])}
    weights = {name for name, value in before.items() if torch.is_tensor(value)}
    frozen = {name for name in weights if name.startswith(("embedding", "decoder.layers.0.", "decoder.layers.1."))}
    assert frozen | ({"output_layer.weight"} & weights if tied else set()) == same


def test_a_run_has_the_model_it_started_from_and_goes_on_without_it(run, tmp_path):
    run("warmup", training__steps=1, model__ffn_size=96)
    start = ["--recipe", "tiny", "--training.init-from", str(tmp_path / "warmup"), "--training.output"]
    assert parse_config([*start, str(tmp_path / "next")]).model.ffn_size == 96
    (tmp_path / "warmup").rename(tmp_path / "next")
    assert parse_config([*start, str(tmp_path / "next")]).model.ffn_size == 96
    with pytest.raises(ArtifactError):
        parse_config([*start, str(tmp_path / "other")])


def test_continual_from_random_weights_is_warned_of_once(run, tmp_path, capsys):
    def warnings():
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: training.init_from")]

    run("warmup", training__steps=1)
    run("from_warmup", training__steps=1, training__stage="continual", training__init_from=tmp_path / "warmup")
    assert not warnings()
    run("bare", training__steps=1, training__stage="continual")
    assert len(warnings()) == 1
    run("bare", training__steps=2, training__stage="continual")
    assert not warnings()


def test_divergence_returns_to_a_trusted_checkpoint_and_training_recovers(run, tmp_path, capsys):
    """A learning rate of 30 really diverges; a thousandth of it does not."""
    summary, records = run(**WILD, guard__lr_factor=0.001)
    [event] = [record for record in records if "event" in record]
    assert event["to"] == 0, "the weights of step 1 were ruined before their loss was seen"
    assert event["skipped"][0] == 4
    steps = [record for record in records if "event" not in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert all(record["lr"] == pytest.approx(0.03) for record in steps)
    assert [record["sequences"] for record in steps[:2]] == [4, event["skipped"][1] + 4]
    assert summary.loss < 8
    lines = [line for line in capsys.readouterr().err.splitlines() if "diverged" in line]
    assert len(lines) == 1
    assert "back to step 0" in lines[0]
    assert "learning rate x 0.001" in lines[0]
    guard = read_manifest(tmp_path / "run" / "step_0000008", "checkpoint", 1).settings["training"]["guard"]
    assert (guard["rollbacks"], guard["skipped"]) == (1, [event["skipped"]])


def test_returns_survive_a_crash_before_the_next_checkpoint(run, tmp_path):
    run(**WILD, guard__lr_factor=0.001)
    for step in range(1, 9):
        shutil.rmtree(tmp_path / "run" / f"step_{step:07d}")
    _, records = run(**WILD, guard__lr_factor=0.001)
    assert len([record for record in records if "event" in record]) == 1, "it diverged again"
    assert records[-1]["lr"] == pytest.approx(0.03)


def test_endless_divergence_is_an_error(run):
    with pytest.raises(M3Error, match=r"guard\.max_rollbacks=2.*lower optimizer\.lr") as caught:
        run(**WILD, guard__lr_factor=1, guard__max_rollbacks=2)
    assert "\n" not in str(caught.value)


def test_non_finite_gradients_return_at_once(run):
    summary, records = run(**(WILD | {"optimizer__lr": 1e30}), guard__lr_factor=1e-32)
    [event] = [record for record in records if "event" in record]
    assert event["from"] == 2
    assert summary.loss < 8


def test_stop_file_saves_and_leaves(run, tmp_path, capsys, monkeypatch):
    told = tmp_path / "nothing_kept"
    monkeypatch.setenv("M3_STANDSTILL", str(told))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    summary, _ = run(training__steps=5)
    assert (summary.finished, summary.step) == (False, 1)
    assert "STOP: saved step 1" in capsys.readouterr().err
    told.touch()
    summary, records = run(training__steps=5)
    assert (summary.finished, len(records)) == (True, 5)
    assert not told.exists(), "a Slurm job would think that nothing was saved"
    told.touch()
    run(training__steps=5)
    assert told.exists()


@pytest.mark.parametrize(("overrides", "message"), [
    ({"parallel__tensor": 2}, r"parallel\.tensor=2.*processes"),
    ({"training__output": ""}, r"training\.output: give the folder"),
    ({"data__tokenizer": ""}, r"data\.tokenizer: give"),
    ({"training__stage": "continual", "data__neighbours": ""}, r"data\.neighbours: give"),
    ({"model__vocab_size": 256}, r"model\.vocab_size=256"),
    ({"training__init_from": "/nowhere"}, r"/nowhere: no such folder"),
])
def test_impossible_settings_are_refused_in_one_line(run, overrides, message):
    with pytest.raises(M3Error, match=message) as caught:
        run(**overrides)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(run, tmp_path):
    run("first", training__steps=1)
    with pytest.raises(ConfigError, match=r"model\.num_layers=2: the checkpoint .* has 4"):
        run("second", model__num_layers=2, training__init_from=tmp_path / "first")


@pytest.mark.parametrize(("field", "value"), [
    ("training__dtype", "bf16"), ("parallel__distributed_optimizer", True), ("training__stage", "continual"),
    ("training__frozen_layers", 1), ("model__ffn_size", 128), ("data__seed", 7), ("data__sequence_length", 48),
    ("memory__prefix", "Text:"),
])
def test_going_on_as_another_run_is_refused(run, field, value):
    run(training__steps=1)
    with pytest.raises(ConfigError, match=field.replace("__", r"\.")):
        run(training__steps=2, **{field: value})


def test_refused_start_leaves_the_run_as_it_was(run, tmp_path):
    run(training__steps=1)
    (tmp_path / "run" / ".step_0000009.tmp").mkdir()
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError):
        run(training__steps=2, memory__prefix="Text:", logging__tensorboard=True)
    assert contents(tmp_path / "run") == before
    with pytest.raises(ConfigError):
        run("second", model__num_layers=2, training__init_from=tmp_path / "run", logging__tensorboard=True)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("field", ["tokens", "neighbours"])
def test_going_on_with_other_data_is_refused(run, training_data, tmp_path, field):
    run(training__steps=1, training__stage="continual")
    folder = shutil.copytree(training_data.folder, tmp_path / "data")
    for name in ("tokens", "neighbours") if field == "tokens" else ("neighbours",):
        shutil.rmtree(folder / name)
    common = ["--input", str(folder / "corpus.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    if field == "tokens":
        lines = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
        (folder / "corpus.jsonl").write_text("".join(lines[::-1]))
        tokenize.main([*common, "--output", str(folder / "tokens")])
    data = SmallData(folder)
    write_neighbours(data.neighbours, TokenStore.open(data.tokens), ReferenceStore.open(data.references),
                     Tokenizer.load(data.tokenizer).hash, seed=1)
    with pytest.raises(ConfigError, match=rf"data\.{field}=.*give the {field} of the run, or start a new") as caught:
        run(training__steps=2, training__stage="continual", data=data)
    assert "\n" not in str(caught.value)


def test_going_on_with_the_data_elsewhere_and_another_loader_works(run, training_data, tmp_path):
    run(training__steps=1)
    data = SmallData(shutil.copytree(training_data.folder, tmp_path / "data"))
    summary, _ = run(training__steps=2, data=data, data__prefetch=2, data__expected_repeats=0.1)
    assert summary.step == 2


def test_another_tokenizer_is_refused(run, other_data, tmp_path):
    run("first", training__steps=1)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*was not trained with it"):
        run("first", training__steps=2, data=other_data)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*another tokenizer; take .*step_0000001/tokenizer"):
        run("second", data=other_data, training__init_from=tmp_path / "first")


@pytest.mark.parametrize("name", ["tokens", "tokenizer"])
def test_output_of_another_kind_is_refused(run, training_data, name):
    before = contents(training_data.folder / name)
    with pytest.raises(ConfigError, match=r"training\.output=.*not a run's folder; choose another"):
        run(training__steps=1, training__output=training_data.folder / name)
    assert contents(training_data.folder / name) == before


def test_output_of_another_run_is_refused_without_resume(run):
    run(training__steps=1)
    with pytest.raises(ConfigError, match=r"training\.output=.*holds checkpoints"):
        run(training__steps=1, checkpoint__resume=False)


def test_bf16_trains(run):
    _, records = run(training__steps=20, training__dtype="bf16", optimizer__lr=0.01)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


def test_damaged_checkpoint_is_refused(run, tmp_path):
    run(training__steps=1)
    path = next((tmp_path / "run" / "step_0000001").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    for place, message in ((len(content) // 3, "checksum"), (len(content) - 300, "checksum")):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match=message):
            run(training__steps=2)
    path.write_bytes(content[:-10])
    with pytest.raises(ArtifactError, match="bytes, the manifest says"):
        run(training__steps=2)
