"""What brings a job back into the queue of a real Slurm, how often, and what ends it (slurm/job.sh)."""

from pathlib import Path

import pytest

from tests.launcher import ROOT
from tests.slurm_cluster import own_cluster, wait_until, why_not

pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(why_not()), reason=why_not())]

LIVES = """\
#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
source slurm/job.sh
case "${SLURM_RESTART_COUNT:-0}" in
    0) run srun bash -c 'trap "sleep 0.5; echo saved; exit" TERM; echo ready; while :; do sleep 0.1; done' ;;
    1) run srun bash -c 'kill -KILL $$' ;;
    2) run srun --kill-on-bad-exit=1 bash slurm/task.sh bash -c 'exec >&2; [ $SLURM_NODEID = 1 ] && exit 2; sleep 60' ;;
esac
"""

STANDS_STILL = """\
#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
M3_RETRIES=1
source slurm/job.sh
export keeps="${SLURM_RESTART_COUNT:-0}"
run srun bash -c '[ $keeps != 1 ] || rm -f "$M3_STANDSTILL"; trap "exit 0" USR1
    echo "ready $M3_STANDSTILL"; while :; do sleep 0.1; done'
"""

MISTAKEN = """\
#!/usr/bin/env bash
#SBATCH --requeue
set -euo pipefail
source slurm/job.sh
run srun bash slurm/task.sh bash -c 'trap "exit 2" USR1; echo ready; while :; do sleep 0.1; done'
"""


@pytest.fixture(scope="module")
def cluster():
    with own_cluster() as running:
        yield running


def test_what_brings_a_job_back_and_what_ends_it(cluster, tmp_path):
    (tmp_path / "job.sh").write_text(LIVES)
    job = cluster.submit("--output", tmp_path / "log", tmp_path / "job.sh")
    wait_until(lambda: cluster.log(job).count("ready") == 2, "no step")
    cluster.preempt(job)
    wait_until(lambda: cluster.jobs(job)[0]["Restarts"] == "2", "the killed step was not repeated")
    cluster.begin_now(job)
    ended = cluster.wait_for(job, "FAILED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("2", "2:0")
    log = cluster.log(job)
    assert log.count("saved") == 2
    assert "was preempted; back into the queue" in log
    assert "step failed with status 137, try 1 of 3; back into the queue" in log
    job = cluster.submit("--output", tmp_path / "cancelled", tmp_path / "job.sh")
    wait_until(lambda: cluster.log(job).count("ready") == 2, "no step")
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED", "PENDING")["JobState"] == "CANCELLED"
    (tmp_path / "mistaken.sh").write_text(MISTAKEN)
    job = cluster.submit("--output", tmp_path / "mistaken", tmp_path / "mistaken.sh")
    wait_until(lambda: "ready" in cluster.log(job), "no step")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for(job, "FAILED", "PENDING")["ExitCode"] == "2:0", "a mistake comes back whenever it is tried"


def test_a_job_that_keeps_nothing_in_its_time_comes_back_so_often_and_ends(cluster, tmp_path):
    """Its second life keeps something, and so begins the count anew."""
    (tmp_path / "job.sh").write_text(STANDS_STILL)
    job = cluster.submit("--output", tmp_path / "log", tmp_path / "job.sh")
    for life in range(4):
        wait_until(lambda: cluster.log(job).count("ready") == 2 * (life + 1), "no step")  # noqa: B023
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm sends before the time is up
        if life < 3:
            wait_until(lambda: cluster.jobs(job)[0]["Restarts"] == str(life + 1), "it did not come back")  # noqa: B023
            cluster.begin_now(job)
    assert cluster.wait_for(job, "FAILED", "PENDING")["ExitCode"] == "1:0", "it comes back without end"
    told = [line.split(": ", 1)[1] for line in cluster.log(job).splitlines() if line.startswith(("job", "error: job"))]
    nothing, back = "its time was nearly up, and it has kept nothing new, try 1 of 1", "; back into the queue"
    assert told[:3] == [nothing + back, "its time was nearly up" + back, nothing + back]
    assert "the time limit is too short" in told[3]
    files = {Path(line.split()[1]) for line in cluster.log(job).splitlines() if line.startswith("ready")}
    assert {path.parent for path in files} == {ROOT}
    assert len(files) == 4
    assert not any(path.exists() for path in files)
