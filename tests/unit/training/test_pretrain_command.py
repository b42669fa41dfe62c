import json
import os
import subprocess
import sys

import pytest

from launch.pretrain import main, parse_config
from megatron_m3.config import get_recipe, to_dict
from megatron_m3.errors import ConfigError
from tests.launcher import ROOT, free_port, run_module, run_ranks


def test_recipe_with_overrides():
    config = parse_config(["--recipe", "tiny", "--training.steps", "20", "--parallel.sequence=false"])
    assert config.training.steps == 20
    assert config.model == get_recipe("tiny").model


def test_config_of_a_run_is_a_start(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(get_recipe("m3-2b"))))
    assert parse_config(["--config", str(path)]) == get_recipe("m3-2b")


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give --recipe NAME or --config FILE"),
    (["--recipe", "tiny", "--config", "x"], "one of them"),
    (["--recipe", "huge"], "recipe=huge: unknown; known are m3-2b"),
    (["--config", "/nowhere.json"], "config=/nowhere.json: cannot be read"),
    (["--recipe", "tiny", "--training.stepz", "3"], "stepz"),
    (["--recipe", "tiny", "--training.steps", "many"], r"training\.steps=many"),
    (["--recipe", "tiny", "--parallel.context", "2"], r"parallel\.context=2.*not supported"),
    (["--recipe", "tiny", "--parallel.tensor", "3"], r"parallel\.tensor=3: must divide"),
    (["--recipe", "tiny", "--parallel.pipeline", "7"], r"parallel\.pipeline=7"),
    (["--recipe", "tiny", "--parallel.interleave", "2"], r"parallel\.interleave=2: needs parallel\.pipeline"),
])
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_config_file_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        parse_config(["--config", str(tmp_path / "list.json")])


def test_interleaved_pipeline_wants_whole_rounds_of_micro_batches():
    from megatron_m3.platform import select

    select()
    from megatron_m3.training.checks import check_run

    config = parse_config(["--recipe", "tiny", "--training.output", "x", "--parallel.pipeline", "2",
                           "--parallel.interleave", "2", "--training.micro_batch", "4"])
    with pytest.raises(ConfigError, match=r"parallel\.interleave=2: the 1 micro-batches .* multiple of parallel"):
        check_run(config, 2)


@pytest.mark.parametrize(("stage", "fits"), [("warmup", True), ("continual", False)])
def test_sequence_parallelism_wants_reference_tokens_that_divide(stage, fits):
    from megatron_m3.platform import select

    select()
    from megatron_m3.training.checks import check_run

    config = parse_config(["--recipe", "tiny", "--training.output", "x", "--parallel.tensor", "2",
                           "--parallel.sequence", "true", "--memory.reference_length", "5",
                           "--memory.chunk_length", "7", "--data.sequence_length", "21", "--training.stage", stage])
    if fits:
        check_run(config, 2)
        return
    with pytest.raises(ConfigError, match=r"parallel\.sequence=true: parallel\.tensor=2 must divide the 15 reference"):
        check_run(config, 2)


def test_command_exits_with_status_2_and_one_line():
    done = run_module("launch.pretrain", ["--recipe", "tiny"], expect=2)
    assert done.stderr == "error: training.output: give the folder of the run\n"
    assert done.stdout == ""


def test_error_that_all_ranks_meet_is_told_once(tmp_path):
    done = run_ranks("launch.pretrain", 2, ["--recipe", "tiny", "--training.output", str(tmp_path / "run"),
                                            "--data.tokenizer", "/nowhere", "--data.tokens", "/nowhere"], expect=None)
    told = [line for line in done.stderr.splitlines() if "error: " in line and "/nowhere" in line]
    assert done.returncode != 0
    assert told == ["error: /nowhere: no such folder"], done.stderr


def test_error_that_one_rank_alone_meets_is_told_with_its_rank(training_data, tmp_path):
    """Two ranks of one world, of which the second looks for its data in a place that it lacks."""
    common = ["--recipe", "tiny", "--training.output", str(tmp_path / "run"), "--data.tokenizer",
              str(training_data.tokenizer), "--logging.peak_tflops", "1", "--logging.tensorboard", "false"]
    world = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen([sys.executable, "-m", "launch.pretrain", *common, "--data.tokens", str(tokens)], cwd=ROOT,
                         env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, stderr=subprocess.PIPE)
        for rank, tokens in enumerate([training_data.tokens, "/nowhere"])
    ]
    try:
        _, told = ranks[1].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[1].returncode == 2, told
    assert told == "rank 1: error: /nowhere: no such folder\n"


@pytest.mark.parametrize(("nodes", "processes", "used"), [(4, 2, 4), (3, 2, 2), (7, 1, 4), (1, 8, 1)])
def test_a_run_uses_as_many_nodes_as_its_batch_divides_by(nodes, processes, used):
    from megatron_m3.training.checks import largest_world

    config = parse_config(["--recipe", "tiny", "--training.output", "x", "--training.global_batch", "8",
                           "--training.micro_batch", "1"])
    assert largest_world(config, nodes, processes) == used
    tensor = parse_config(["--recipe", "tiny", "--training.output", "x", "--parallel.tensor", "2"])
    assert largest_world(tensor, 3, 1) == 2
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 .* there are 1"):
        largest_world(tensor, 1, 1)
