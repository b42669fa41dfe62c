"""Jobs and chains on a real Slurm of two nodes on this machine: submitted, preempted, killed, and gone on with."""

import hashlib
import json
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import requests

from launch.m3 import main
from megatron_m3.manifest.claims import CLAIMS, Claims
from megatron_m3.model.checkpoint import list_checkpoints
from tests.launcher import ROOT
from tests.slurm_cluster import PATH, own_cluster, slurm_cluster, wait_until, why_not

pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(why_not()), reason=why_not())]

CHAIN = "slurm/chains/demo-small.yaml"
STEPS = 16
SIZES = {"nodes": 2, "train_entries": 1000, "other_entries": 0, "heldout": 4, "vocab_size": 512, "warmup_steps": 2,
         "continual_steps": STEPS, "save_every": 100, "modes": "none explicit", "references_in_block": 128,
         "documents_in_block": 16}
SHARED = ("documents", "filtered", "unique", "tokens", "references", "embeddings", "index", "neighbours")
LEAVES_AND_COMES_BACK = """\
#!/usr/bin/env bash
#SBATCH --time=1
#SBATCH --signal=B:USR1@15
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
source slurm/job.sh
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then echo came back; exit; fi
run srun bash -c 'trap "echo saved and left; exit" USR1; while :; do sleep 0.1; done'
"""

@pytest.fixture(scope="module")
def cluster():
    with own_cluster() as running:
        yield running


def m3(cluster, job, chain, output, **variables):
    """``m3 slurm JOB``; its answer read from JSON, by step."""
    given = ",".join(f"{name}={value}" for name, value in (variables | {"output": output}).items())
    words = [sys.executable, "-m", "launch.m3", "slurm", job, chain, "--set", given, "--json"]
    return {one["step"]: one for one in json.loads(cluster.run(*words))}


@pytest.fixture(scope="module")
def timed(cluster, tmp_path_factory):
    """A job whose time is up before it is done; it goes on beside the first steps of the chain."""
    folder = tmp_path_factory.mktemp("timed")
    (folder / "job.sh").write_text(LEAVES_AND_COMES_BACK)
    return cluster.submit("--output", folder / "log", folder / "job.sh")


@pytest.fixture(scope="module")
def chain(cluster, timed, tmp_path_factory):
    """Output of the chain of the whole small pipeline, what was said when it was submitted twice, and in its midst."""
    output = tmp_path_factory.mktemp("chain") / "run"
    first = m3(cluster, "submit", CHAIN, output, **SIZES)
    second = m3(cluster, "submit", CHAIN, output, **SIZES)
    cluster.wait_for(timed, "PENDING", "RUNNING")
    wait_until(lambda: has_steps(output / "continual", 1), "no step was taken")
    cluster.run("scontrol", "suspend", first["continual"]["job"])
    status = m3(cluster, "status", CHAIN, output, **SIZES)
    cluster.run("scontrol", "resume", first["continual"]["job"])
    for step in first.values():
        cluster.wait_for(step["job"], "COMPLETED")
    return output, first, second, status


def curve(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def has_steps(folder, count):
    path = folder / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) >= count


def words_of(chain, step, output):
    """The words of a step of the chain, for another output."""
    script = (chain / "slurm" / f"{step}.sbatch").read_text()
    line = next(line for line in script.splitlines() if line.startswith("set -- "))
    return line.removeprefix("set -- ").replace(f"{chain}/{step}", str(output)).split()


def digest(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def process_of(module, under):
    """A Python process that runs ``module`` in a job."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if environment.get("SLURM_JOB_ID") == under and module in words and "python" in words[0]:
            return process
    return None


def test_a_chain_runs_once_over_two_nodes(cluster, chain):
    output, first, second, status = chain
    assert [step["done"] for step in first.values()] == ["submitted"] * 14
    assert [step["done"] for step in second.values()] == ["left alone"] * 14
    assert [step["job"] for step in second.values()] == [step["job"] for step in first.values()]
    training, waiting = status["continual"], status["bank"]
    assert training["state"] == "suspended"
    assert training["line"].startswith("step ")
    assert training["tokens_per_second"] > 0
    assert (waiting["state"], waiting["why"]) == ("pending", "waits for the steps before it")
    third = m3(cluster, "submit", CHAIN, output, **SIZES)
    assert {step["done"] for step in third.values()} == {"finished"}
    assert {one["state"] for one in m3(cluster, "status", CHAIN, output, **SIZES).values()} == {"finished"}
    log = next((output / "slurm").glob("continual-*.log")).read_text()
    assert "training on 2 nodes, 1 processes each" in log
    assert "CPU x 2 (gloo): tensor 1 x pipeline 1 x data 2" in log
    assert len(curve(output / "continual")) == STEPS
    assert sorted(path.name for path in output.glob("scores_*")) == ["scores_explicit.jsonl", "scores_none.jsonl"]


def test_jobs_that_share_a_step_make_what_one_process_makes(chain, tmp_path):
    for step in SHARED:
        assert len(list((chain[0] / "slurm").glob(f"{step}-*_[01].log"))) == 2
        main(["data", *words_of(chain[0], step, tmp_path / step)])
        assert digest(tmp_path / step) == digest(chain[0] / step), step
    counts = json.loads((chain[0] / "filtered" / "counts.json").read_text())
    assert 40 <= counts["documents"] < counts["came in"]


def test_an_array_loses_elements_gets_them_back_and_makes_the_same(cluster, tmp_path):
    """The test itself holds a piece of the work meanwhile, so that no element can be done before it is killed."""
    lines = [json.dumps({"id": str(number), "text": f"text {number} of many words " * 30}) for number in range(5000)]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines))
    shared, claims = tmp_path / "shared", tmp_path / "shared" / CLAIMS
    words = ["collect", "--input", str(tmp_path / "raw.jsonl"), "--block-megabytes", "1", "--output"]
    with Claims(claims) as held:
        held.take("0")
        job = cluster.submit("--array=0-2", "--output", tmp_path / "log-%a", "slurm/data.sbatch", *words, shared)
        wait_until(lambda: len(list(claims.glob("*.alive"))) == 4, "not all elements work")
        killed = process_of("launch.m3", job)  # of the element that bears the array's own number
        last = killed.environ()["SLURM_ARRAY_TASK_ID"]
        others = sorted({"0", "1", "2"} - {last})
        killed.kill()
        wait_until(lambda: sorted(one["Restarts"] for one in cluster.jobs(job)) == ["0", "0", "1"], "not one came back")
        assert {cluster.wait_for(f"{job}_{one}", "RUNNING")["Restarts"] for one in others} == {"0"}
        cluster.preempt(*(f"{job}_{one}" for one in others))
    for one in others:
        assert cluster.wait_for(f"{job}_{one}", "COMPLETED")["Restarts"] == "1"
        assert "was preempted; back into the queue" in (tmp_path / f"log-{one}").read_text()
    made = digest(shared)
    cluster.begin_now(f"{job}_{last}")
    cluster.wait_for(f"{job}_{last}", "COMPLETED")
    log = (tmp_path / f"log-{last}").read_text()
    assert "step failed with status 137, try 1 of 3; back into the queue" in log
    assert "made already" in log
    main(["data", *words, str(tmp_path / "alone")])
    assert digest(tmp_path / "alone") == made == digest(shared)


def test_a_job_converts_a_checkpoint(cluster, chain, tmp_path):
    words = ["to-hf", chain[0] / "continual", tmp_path / "model"]
    cluster.run("sbatch", "--wait", "--output", tmp_path / "log", "slurm/convert.sbatch", *words)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_job_whose_time_is_up_leaves_and_comes_back(cluster, chain, timed):
    cluster.begin_now(timed)
    assert cluster.wait_for(timed, "COMPLETED")["Restarts"] == "1"
    lines = cluster.log(timed).splitlines()
    assert lines.index("saved and left") < lines.index("came back")


def test_a_preempted_training_goes_on_to_the_same_losses(cluster, chain, tmp_path):
    run = tmp_path / "run"
    words = words_of(chain[0], "continual", run)
    job = cluster.submit("--nodes=2", "--output", tmp_path / "log", "slurm/pretrain.sbatch", *words)
    wait_until(lambda: has_steps(run, 1) or cluster.wait_for(job, "PENDING", "RUNNING") is None, "no step was taken")
    cluster.preempt(job)
    assert cluster.wait_for(job, "COMPLETED")["Restarts"] == "1"
    saved = re.search(r"SIG(USR1|TERM): saved step (\d+) in", cluster.log(job))
    assert saved, cluster.log(job)
    assert 0 < int(saved[2]) < STEPS
    assert f"going on after step {saved[2]} from" in cluster.log(job)
    assert curve(run) == curve(chain[0] / "continual")


def test_a_training_that_lost_a_node_goes_on_without_it(cluster, chain, tmp_path):
    run = tmp_path / "run"
    words = [*words_of(chain[0], "continual", run), "--checkpoint.every", "2"]
    job = cluster.submit("--nodes=1-2", "--output", tmp_path / "log", "slurm/pretrain.sbatch", *words)
    wait_until(lambda: len(list_checkpoints(run)) >= 2 or not cluster.wait_for(job, "PENDING", "RUNNING"), "no save")
    try:
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        cluster.begin_now(job)
        assert len(curve(run)) < STEPS
        found = cluster.wait_for(job, "COMPLETED")
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert (found["Restarts"], found["NodeList"]) == ("1", "n1")
    assert "training on 1 nodes" in cluster.log(job)
    for (step, loss, norm), (wanted_step, wanted_loss, wanted_norm) in zip(
        curve(run), curve(chain[0] / "continual"), strict=True
    ):
        assert step == wanted_step
        assert (loss, norm) == pytest.approx((wanted_loss, wanted_norm), rel=1e-3)


def test_a_killed_bank_rank_is_made_good(cluster, chain, tmp_path):
    bank, output = tmp_path / "bank", chain[0]
    words = ["--checkpoint", output / "continual", "--references", output / "references", "--output", bank]
    job = cluster.submit("--nodes=2", "--output", tmp_path / "log", "slurm/build_bank.sbatch", *words, "--codec=auto")
    wait_until(lambda: process_of("launch.build_bank", job), "no rank")
    process_of("launch.build_bank", job).send_signal(signal.SIGKILL)
    cluster.begin_now(job)
    assert not (bank / "manifest.json").exists()
    # Slurm itself may fail to begin a step of MPI right after it ended another; that is tried again as well
    assert 1 <= int(cluster.wait_for(job, "COMPLETED")["Restarts"]) <= 3
    assert "try 1 of 3; back into the queue" in cluster.log(job)
    assert digest(bank) == digest(output / "bank")


BROKEN = """\
name: broken
output: nowhere
steps:
  tokenizer:
    script: data
    run: tokenizer --input {output}/texts.jsonl --output {output}/tokenizer --vocab-size 300
    makes: tokenizer
  tokens:
    script: data
    run: tokenize --input {output}/texts.jsonl --tokenizer {output}/tokenizer --output {output}/tokens
    makes: tokens
    after: [tokenizer]
"""


def test_a_failed_step_is_told_and_mended(cluster, tmp_path):
    (tmp_path / "chain.yaml").write_text(BROKEN)
    file, output = str(tmp_path / "chain.yaml"), tmp_path / "a run"
    (tmp_path / "other.yaml").write_text(f"{BROKEN}slurm: {{partition: nowhere}}\n")
    submit = f"{sys.executable} -m launch.m3 slurm submit {tmp_path}/other.yaml --set 'output={output}' 2>&1"
    [told] = cluster.run("bash", "-c", submit, check=False).splitlines()
    assert told.startswith("error: tokenizer: sbatch refuses it (invalid partition specified: nowhere;")
    first = m3(cluster, "submit", file, output)
    cluster.wait_for(first["tokenizer"]["job"], "FAILED")
    cluster.wait_for(first["tokens"]["job"], "CANCELLED")
    status = m3(cluster, "status", file, output)
    assert status["tokenizer"]["state"] == "failed"
    assert "exit status 2" in status["tokenizer"]["why"]
    assert status["tokenizer"]["line"].startswith(f"error: {output}/texts.jsonl")
    assert status["tokens"]["why"] == "a step before it failed"
    lines = [json.dumps({"id": str(number), "text": f"text {number}"}) for number in range(9)]
    (output / "texts.jsonl").write_text("\n".join(lines))
    second = m3(cluster, "submit", file, output)
    assert {step["done"] for step in second.values()} == {"submitted"}
    cluster.wait_for(second["tokens"]["job"], "COMPLETED")
    assert {one["state"] for one in m3(cluster, "status", file, output).values()} == {"finished"}


KILLS = """\
#!/usr/bin/env bash
[ "$1" != --version ] || exec SBATCH "$@"
case WHEN in
    before) kill -KILL $PPID ;;
    meanwhile) kill -KILL $PPID; until [ -e FOLDER/go ]; do sleep 0.05; done; SBATCH "$@" ;;
    after) SBATCH "$@"; kill -KILL $PPID ;;
esac
"""


@pytest.mark.parametrize(("when", "done"), [
    ("before", "submitted"), ("meanwhile", "left alone"), ("after", "left alone")])
def test_what_a_killed_command_submitted_is_not_submitted_again(cluster, tmp_path, when, done):
    """The sbatch that it calls kills it; a job of an array, which is held, and one that waits for it."""
    chain, output, kills = tmp_path / "chain.yaml", tmp_path / "run", tmp_path / "bin" / "sbatch"
    chain.write_text(BROKEN.replace("broken", "killed").replace(
        "makes: tokenizer\n", "makes: tokenizer\n    slurm: {hold: true}\n    array: one two\n"))
    kills.parent.mkdir()
    real = shutil.which("sbatch", path=PATH)
    kills.write_text(KILLS.replace("SBATCH", real).replace("WHEN", when).replace("FOLDER", str(tmp_path)))
    kills.chmod(0o755)
    submit = f"{sys.executable} -m launch.m3 slurm submit {chain} --set output={output} 2>&1"
    cluster.run("bash", "-c", f"! PATH={kills.parent}:$PATH {submit}")
    if when == "meanwhile":
        assert "another `m3 slurm submit` of this chain is at work" in cluster.run("bash", "-c", submit, check=False)
        (tmp_path / "go").touch()
        cluster.run("flock", output / "slurm" / "lock", "true")
    first = m3(cluster, "submit", chain, output)
    assert [step["done"] for step in first.values()] == [done, "submitted"]
    assert [step["done"] for step in m3(cluster, "submit", chain, output).values()] == ["left alone"] * 2
    known = cluster.run("squeue", "--noheader", "--format=%F %j").splitlines()
    assert sorted(line for line in known if "killed." in line) == sorted(
        f"{step['job']} killed.{name}" for name, step in first.items())
    cluster.run("scancel", *(step["job"] for step in first.values()))


SERVER = """\
name: service
output: nowhere
variables: {made: nowhere}
steps:
  server:
    script: serve
    run: >-
      --checkpoint {made}/continual --references {made}/references --index {made}/index --bank {made}/bank
      --address-file {output}/address
    makes: ""
"""


def test_a_server_tells_where_it_listens_and_ends_well_when_its_time_is_up(cluster, chain, tmp_path):
    (tmp_path / "chain.yaml").write_text(SERVER)
    address, words = tmp_path / "run" / "address", (cluster, str(tmp_path / "chain.yaml"), tmp_path / "run")

    def server(job):
        return m3(words[0], job, *words[1:], made=chain[0])["server"]

    job = server("submit")["job"]
    wait_until(lambda: address.exists() or not cluster.wait_for(job, "PENDING", "RUNNING"), "it does not listen")
    where = f"http://{address.read_text().strip()}"
    assert server("submit")["done"] == "left alone"
    status = server("status")
    assert (status["state"], status["line"].split(" (")[0]) == ("running", f"serving continual at {where}")
    answer = requests.post(f"{where}/v1/completions", json={"prompt": "a kind of bird", "memories": True}, timeout=600)
    assert answer.json()["choices"][0]["memories"][0]["references"]
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm sends before the time is up
    assert cluster.wait_for(job, "COMPLETED")["ExitCode"] == "0:0"
    assert not address.exists()
    assert server("status")["state"] == "ended"
    again = server("submit")
    assert again["done"] == "submitted"
    cluster.run("scancel", again["job"])
    cluster.wait_for(again["job"], "CANCELLED")


GPUS = """\
#!/usr/bin/env bash
set -euo pipefail
(
    unset SLURM_GPUS_ON_NODE
    SLURM_JOB_NODELIST='n[1-9000]' PATH="FOLDER:$PATH" source slurm/environment.sh
    echo "$M3_PROCESSES_PER_NODE processes, they meet at ${M3_RENDEZVOUS%:*}"
)
M3_CONTAINER=image.sqsh source slurm/environment.sh
echo "${M3_SRUN[@]}"
source slurm/environment.sh
srun "${M3_SRUN[@]}" bash -c 'echo "$M3_PROCESSES_PER_NODE processes, ${SLURM_GPUS_ON_NODE:-no} GPUs"'
"""


def test_steps_get_the_gpus_of_their_nodes_and_nothing_is_left_of_the_cluster(tmp_path):
    """A cluster of its own, since the others' still runs; its GPUs are files."""
    (tmp_path / "job.sh").write_text(GPUS.replace("FOLDER", str(tmp_path)))
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed: no driver here\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    folder = Path(tempfile.mkdtemp(prefix="m3slurm_", dir="/tmp"))
    with slurm_cluster(folder, gpus=2) as running:
        daemons = [process.pid for process in running.processes.values()]
        for name, asked, gpus in (("whole", "--exclusive", 2), ("one", "--gpus=1", 1)):
            running.run("sbatch", "--wait", "--output", tmp_path / name, asked, tmp_path / "job.sh")
            bare, words, line = (tmp_path / name).read_text().splitlines()
            assert bare == "1 processes, they meet at 127.0.0.1"
            assert words.startswith(f"--container-image=image.sqsh --container-mounts={ROOT}:{ROOT} --container-work")
            assert line == f"{gpus} processes, {gpus} GPUs"
        job = running.submit("--output=/dev/null", "--wrap", "sleep 600")
        running.wait_for(job, "RUNNING")
    assert not [pid for pid in daemons if psutil.pid_exists(pid)]
    shutil.rmtree(folder)
