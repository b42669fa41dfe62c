"""Chains of Slurm jobs: what a YAML file becomes, and what is wrong with one that becomes nothing."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.slurm_chain import ROOT, SCRIPTS, load_chain, render
from launch.slurm_jobs import Job, Submitted, complaint, joint_state, read_state, run_slurm, write_state
from launch.slurm_status import explain, last_line
from launch.slurm_submit import main
from megatron_m3.errors import ArtifactError, ConfigError, M3Error, UnsupportedError

CHAIN = """\
name: small
output: runs/small
variables: {{count: 7, words: b c}}
slurm: {{partition: main, time: 8:00:00}}
steps:
  second:
    script: pretrain
    run: --name "two words" --count {{count:03d}}
    makes: run/step_{{count:03d}}
    after: [first]
    slurm: {{time: 60, nodes: "{{count}}", exclusive: null}}
  first: {first}
"""
FIRST = ('{script: data, run: "tokenize --input a@b/{element}.jsonl --output {output}/{element}", '
         'makes: "tokens/{element}", array: "a {words}"}')


def write(folder: Path, text: str) -> Path:
    (folder / "chain.yaml").write_text(text)
    return folder / "chain.yaml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, CHAIN.format(first=FIRST))


def test_steps_stand_after_those_they_wait_for_with_variables_filled_in(path: Path) -> None:
    chain = load_chain(path)
    first, second = chain.steps
    assert (first.name, second.name, second.after) == ("first", "second", ("first",))
    assert chain.output == Path("runs/small").absolute()
    assert second.makes == (chain.output / "run" / "step_007",)
    assert first.makes == tuple(chain.output / "tokens" / word for word in ("a", "b", "c"))
    assert "set -- --name 'two words' --count 007\n" in second.script
    assert "#SBATCH --array=0-2\n" in first.script
    assert "export M3_ARRAY='a b c'\n" in first.script
    assert f"set -- tokenize --input 'a@b/{{element}}.jsonl' --output '{chain.output}/{{element}}'\n" in first.script


def test_options_of_a_step_go_before_the_chains_and_these_before_the_scripts(path: Path) -> None:
    first, second = load_chain(path).steps
    options = {line for line in second.script.splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --time=60", "#SBATCH --nodes=7", "#SBATCH --partition=main", "#SBATCH --requeue",
            "#SBATCH --job-name=small.second"} <= options
    assert not [line for line in options if "exclusive" in line]
    assert "#SBATCH --time=8:00:00\n" in first.script


def test_replaced_variables_change_the_step_and_those_after_it(path: Path, tmp_path: Path) -> None:
    before, words, count = (load_chain(path, given).steps for given in ((), ("words=d",), ("count=8",)))
    assert before[0].hash != words[0].hash
    assert before[1].script == words[1].script
    assert before[1].hash != words[1].hash
    assert before[0].hash == count[0].hash
    assert load_chain(path, (f"output={tmp_path}",)).output == tmp_path
    spaced = load_chain(path, (f"output={tmp_path}/a b",)).steps[0]
    assert f" --output '{tmp_path}/a b/{{element}}'\n" in spaced.script
    assert f'#SBATCH --output="{tmp_path}/a b/slurm/first-%A_%a.log"\n' in spaced.script


def test_what_is_made_is_known_by_its_manifest_or_its_file(path: Path, tmp_path: Path) -> None:
    first, second = load_chain(path, (f"output={tmp_path / 'run'}",)).steps
    second.makes[0].mkdir(parents=True)
    assert not second.is_made
    (second.makes[0] / "manifest.json").touch()
    assert second.is_made
    for place in first.makes:
        assert not first.is_made
        place.parent.mkdir(exist_ok=True)
        place.touch()
    assert first.is_made


@pytest.mark.parametrize(("change", "message"), [
    (("script: data", "script: dta"), r"steps\.first\.script=dta: unknown; known are .*data"),
    (("{output}/", "{otput}/"), r"steps\.first\.run: \{otput\} is not a variable"),
    (("{words}", "{words"), r"steps\.first\.array: .*braces"),
    (("after: [first]", "after: [frist]"), r"steps\.second\.after: no step frist"),
    (("makes: run", "mkes: run"), r"steps\.second: lacks makes"),
    (("time: 60", "output: x"), r"steps\.second\.slurm\.output: is set by the chain"),
    (("name: small", "name: a b"), r"name=a b: use letters"),
    (("name: small", "name: small\nsise: 3"), "sise: unknown field"),
    (("name: small", "name: [small"), "not readable as YAML"),
    (('"two words"', '"two words'), r"steps\.second\.run: No closing quotation"),
    (("array:", "after: [second], array:"), "wait for each other"),
    (("makes: run/", "makes: run/{element}"), r"steps\.second\.makes: \{element\} is not a variable"),
    (("slurm: {time: 60", "slurm: 60 #"), r"steps\.second\.slurm: must hold names and values; write NAME: VALUE"),
    (("variables: {", "variables: {element: x, "), r"variables\.element: is the word of an array's element"),
])
def test_mistakes_are_told_with_their_place(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = CHAIN.format(first=FIRST)
    assert change[0] in text
    with pytest.raises(ConfigError, match=message) as caught:
        load_chain(write(tmp_path, text.replace(*change)))
    assert "\n" not in str(caught.value)


def test_unknown_variables_and_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set cuont=8: give NAME=VALUE; variables .* count, words"):
        load_chain(path, ("cuont=8",))
    with pytest.raises(ConfigError, match=r"--set count=\[: not readable as YAML"):
        load_chain(path, ("count=[",))
    with pytest.raises(ConfigError, match="output: is empty; give a folder"):
        load_chain(path, ("output=",))
    with pytest.raises(ConfigError, match="No such file"):
        load_chain(tmp_path / "other.yaml")


def test_without_steps_or_slurm_nothing_is_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="lacks steps"):
        load_chain(write(tmp_path, "name: a\noutput: b\n"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="sbatch: not found; run this on a machine from which"):
        main([str(write(tmp_path, CHAIN.format(first=FIRST))), "--set", f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed: make slurm-packages")
def test_a_controller_that_is_down_is_told_before_a_job_is_submitted(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=x(127.0.0.1)\nSlurmctldPort=1\n"
                                         "NodeName=n1\nPartitionName=p Nodes=n1\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(M3Error, match=r"^scontrol ping: .* DOWN; submit when Slurm's controller is up, or .*$"):
        main([str(path), "--set", f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_jobs_submitted_from_an_element_of_an_array_are_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    handed_on = run_slurm("env").stdout.splitlines()
    assert "SLURM_JOB_PARTITION=main" in handed_on
    assert not [line for line in handed_on if line.startswith("SLURM_ARRAY_")]


def test_what_slurm_says_against_a_job_becomes_one_line() -> None:
    said = "sbatch: error: no partition: x\nsbatch: error: Batch job submission failed\nTry \"sbatch --help\" for more"
    done = subprocess.CompletedProcess([], 1, "", said)
    assert complaint(done) == "no partition: x; Batch job submission failed"
    assert complaint(subprocess.CompletedProcess([], 1, "", "")) == "no answer"


def test_a_dry_run_shows_the_scripts_and_writes_nothing(path: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    main([str(path), "--set", f"output={tmp_path / 'run'}", "--dry-run"])
    shown = capsys.readouterr().out
    assert all(step.script in shown for step in load_chain(path, (f"output={tmp_path / 'run'}",)).steps)
    assert "# ---- second  after first\n" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.stem)
def test_scripts_are_bash_before_and_after_rendering(script: Path) -> None:
    base = script.read_text()
    rendered = render(base, {"time": 5}, ["a b", "c"])
    for text in (base, rendered):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert rendered.splitlines()[0] == "#!/usr/bin/env bash"
    assert set(re.findall(r"source (\S+)", base)) <= {f"slurm/{one.name}" for one in SCRIPTS.glob("*.sh")}


@pytest.mark.parametrize("chain", sorted((ROOT / "slurm" / "chains").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_chains_hold_together(chain: Path) -> None:
    steps = load_chain(chain).steps
    assert {"score", "bank"} <= {step.name for step in steps}
    assert len({step.makes for step in steps}) == len(steps)


def test_state_is_kept_and_damage_told(path: Path, tmp_path: Path) -> None:
    chain = load_chain(path, (f"output={tmp_path / 'run'}",))
    assert read_state(chain) == {}
    write_state(chain, {"first": Submitted(job="12", hash="ab")})
    assert read_state(chain) == {"first": Submitted(job="12", hash="ab")}
    (chain.folder / "state.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"state\.json: damaged"):
        read_state(chain)


@pytest.mark.parametrize(("states", "joint"), [
    ((), "UNKNOWN"), (("COMPLETED", "COMPLETED"), "COMPLETED"), (("COMPLETED", "FAILED"), "FAILED"),
    (("FAILED", "PENDING"), "PENDING"), (("PENDING", "RUNNING"), "RUNNING"),
])
def test_an_array_has_the_state_that_matters(states: tuple[str, ...], joint: str) -> None:
    assert joint_state([Job(name="x", state=state) for state in states]) == joint


@pytest.mark.parametrize(("job", "words"), [
    (Job(name="x", state="PENDING", reason="Priority"), "others stand before it in the queue"),
    (Job(name="x", state="PENDING", reason="Licenses"), "Licenses"),
    (Job(name="x", state="FAILED", reason="NonZeroExitCode", exit_code="2:0"), "its script failed (exit status 2)"),
    (Job(name="x", state="FAILED", exit_code="0:9"), "signal 9"),
    (Job(name="x", state="RUNNING"), ""),
])
def test_why_a_job_waits_or_failed_is_told_in_words(job: Job, words: str) -> None:
    assert explain(job) == words


def test_the_last_line_is_that_of_the_job_not_of_srun(path: Path, tmp_path: Path) -> None:
    chain = load_chain(path, (f"output={tmp_path / 'run'}",))
    chain.folder.mkdir(parents=True)
    second = chain.steps[1]
    (chain.folder / "second-12.log").write_text("begin\nerror: no tokens\nE1 failed\nsrun: error: n1: Exited\n")
    assert last_line(second, Submitted(job="12", hash="")) == "error: no tokens"
    (chain.folder / "second-12.log").write_text("begin\n10 of 20\rslurmstepd-n1: error: JOB 12 CANCELLED\n")
    assert last_line(second, Submitted(job="12", hash="")) == "10 of 20"
    assert last_line(second, Submitted(job="13", hash="")) == ""


def test_a_training_is_told_by_its_step_line_unless_it_failed(path: Path, tmp_path: Path) -> None:
    chain = load_chain(path, (f"output={tmp_path / 'run'}",))
    second, submitted = chain.steps[1], Submitted(job="12", hash="")
    chain.folder.mkdir(parents=True)
    second.makes[0].parent.mkdir()
    record = {"step": 3, "steps": 9, "loss": 2.5, "grad_norm": 1, "lr": 0.1, "tokens_per_second": 1234, "mfu": 0.4,
              "seconds_left": 60}
    lines = json.dumps(record) + '\n{"event": "rollback", "loss": 1}\n{"st'
    (second.makes[0].parent / "metrics.jsonl").write_text(lines)
    (chain.folder / "second-12.log").write_text("error: no tokens\n")
    assert last_line(second, submitted).startswith("step 3/9  33% | loss 2.5000")
    assert "1.23k tokens/s" in last_line(second, submitted)
    assert last_line(second, submitted, is_failed=True) == "error: no tokens"


@pytest.mark.parametrize(
    ("words", "given", "status", "said"),
    [
        ("data tokenize --input x", {}, 0, "launch.m3 data tokenize --input x"),
        ("data tokenize --input {element}.txt a@b {element}", {"SLURM_ARRAY_TASK_ID": "1", "M3_ARRAY": "a &b"}, 0,
         "tokenize --input &b.txt a@b &b"),
        ("data filter --input a@b", {"SLURM_ARRAY_TASK_ID": "1", "M3_ARRAY": "1 2"}, 0, "data filter --input a@b"),
        ("data tokenize --input x", {"SLURM_ARRAY_TASK_ID": "1"}, 0, "launch.m3 data tokenize --input x"),
        ("data inspect --input x", {"SLURM_ARRAY_TASK_ID": "1"}, 2, "array of m3 data inspect would all do the same"),
        ("score --input x", {"SLURM_ARRAY_TASK_ID": "1"}, 2, "array of m3 score --input would all do the same"),
        ("score --mode {element}", {"SLURM_ARRAY_TASK_ID": "2", "M3_ARRAY": "a b"}, 2, "(M3_ARRAY=a b, element 2)"),
        ("score --mode {element}", {"M3_ARRAY": "a b"}, 2, "error: {element} needs --array=0-N"),
    ],
)
def test_an_array_takes_a_word_each_or_shares_what_can_be_shared(words, given, status, said):
    script = ('set -euo pipefail; M3_SRUN=(); source slurm/job.sh; run() { echo "$@"; }; '
              f"set -- {words}; source slurm/one_process.sh")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"} | given,
                          text=True, capture_output=True, check=False)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
