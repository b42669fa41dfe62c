"""What Slurm says of jobs, and what a chain remembers of those it submitted."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launch.slurm_chain import ROOT, Chain, Step
from megatron_m3.errors import ArtifactError, M3Error, UnsupportedError
from megatron_m3.manifest import atomic_path

STATE = "state.json"
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
GONE = "UNKNOWN"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, or one element of an array, as Slurm knows it."""

    name: str
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    exit_code: str = ""
    restarts: str = "0"

    @property
    def is_active(self) -> bool:
        """Whether it runs or waits."""
        return self.state in RUNNING + WAITING


def run_slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands from the repository's root.

    An array's variables are kept from it: sbatch would hand them on to jobs that are no elements of it. So are those
    that choose what squeue shows. It inherits the lock of :func:`alone`.

    Raises:
        UnsupportedError: there is no such command here.
    """
    if shutil.which(command[0]) is None:
        raise UnsupportedError(f"{command[0]}: not found; run this on a machine from which Slurm jobs are submitted")
    hidden = ("SLURM_ARRAY_", "SQUEUE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False,
                          close_fds=False)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What one of Slurm's commands said against its words, on one line, without its name and its advice."""
    lines = [re.sub(r"^\w+: ((error|fatal): )?", "", line) for line in done.stderr.strip().splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if not line.startswith("Try "))) or "no answer"


def check_slurm() -> None:
    """Check that jobs can be submitted.

    Raises:
        UnsupportedError: there is no Slurm here.
        M3Error: no controller answers.
    """
    run_slurm("sbatch", "--version")
    done = run_slurm("scontrol", "ping")
    if " is UP" not in done.stdout:
        said = done.stdout.partition("\n")[0] or complaint(done)
        raise M3Error(f"scontrol ping: {said}; submit when Slurm's controller is up, or mend slurm.conf (SLURM_CONF)")


def ask_slurm(job_id: str) -> list[Job]:
    """The job, or the elements of the array, with this number; none where Slurm has forgotten it.

    Accounting is asked only where the controller has forgotten it, since many clusters have none.

    Raises:
        M3Error: the controller does not answer.
    """
    done = run_slurm("scontrol", "--oneliner", "show", "job", job_id)
    if done.returncode == 0:
        return [_read_job(line) for line in done.stdout.splitlines() if line.startswith("JobId=")]
    if "Invalid job id" not in done.stderr:
        raise M3Error(f"scontrol: {complaint(done)}; see whether the controller is up (scontrol ping), and try again")
    if shutil.which("sacct") is None:
        return []
    columns = "JobName,State,NodeList,Elapsed,ExitCode"
    done = run_slurm("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", f"--format={columns}")
    rows = [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [Job(name=name, state=state.split()[0], nodes=nodes, elapsed=elapsed, exit_code=exit_code)
            for name, state, nodes, elapsed, exit_code in rows]


def find_job(mark: str) -> str:
    """Number of the job whose command ends with ``mark``; nothing where Slurm knows of none.

    Raises:
        M3Error: the controller does not answer.
    """
    done = run_slurm("squeue", "--all", "--noheader", "--states=all", "--format=%F %o")
    if done.returncode:
        raise M3Error(f"squeue: {complaint(done)}; see whether the controller is up (scontrol ping), and try again")
    return next((line.split()[0] for line in done.stdout.splitlines() if line.endswith(f" {mark}")), "")


def _read_job(line: str) -> Job:
    fields = dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", line))
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return Job(name=fields["JobName"], state=fields["JobState"], reason=fields.get("Reason", "").replace("None", ""),
               nodes=nodes, elapsed=fields.get("RunTime", "") if nodes else "", exit_code=fields.get("ExitCode", ""),
               restarts=fields.get("Restarts", "0"))


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A step that was given to Slurm."""

    job: str
    """Its job's number; nothing as long as sbatch has not told it."""
    hash: str
    """The step's hash then."""
    mark: str = ""
    """Until then the last word of the job's command, by which Slurm finds it."""


def read_state(chain: Chain) -> dict[str, Submitted]:
    """What was submitted of a chain, by step, also where the command ended before it had learnt the job's number.

    Raises:
        ArtifactError: the file is damaged.
        M3Error: the controller does not answer.
    """
    path = chain.folder / STATE
    try:
        state = {name: Submitted(**values) for name, values in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise ArtifactError(f"{path}: damaged; see which jobs of the chain run (squeue), and remove it") from None
    state |= {name: replace(one, job=find_job(one.mark), mark="") for name, one in state.items() if not one.job}
    return {name: one for name, one in state.items() if one.job}


def write_state(chain: Chain, state: dict[str, Submitted]) -> None:
    """Remember what was submitted."""
    with atomic_path(chain.folder / STATE) as path:
        path.write_text(json.dumps({name: vars(one) for name, one in state.items()}, indent=1) + "\n")


@contextlib.contextmanager
def alone(chain: Chain) -> Iterator[None]:
    """Keep others from submitting the same chain during the block, and as long as an sbatch outlives this process."""
    chain.folder.mkdir(parents=True, exist_ok=True)
    with (chain.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise M3Error(f"{chain.folder}: another `m3 slurm submit` of this chain is at work; wait for it") from None
        os.set_inheritable(lock.fileno(), True)
        yield


def jobs_of(chain: Chain, step: Step, submitted: Submitted | None) -> list[Job]:
    """The jobs that were submitted for a step; a number that Slurm has given to another job since is not one."""
    found = ask_slurm(submitted.job) if submitted else []
    return [job for job in found if job.name == chain.job_name(step)]


def joint_state(jobs: Sequence[Job]) -> str:
    """One state for all elements of an array: that of one that runs, else waits, else did not end well."""
    states = [job.state for job in jobs]
    for wanted in (RUNNING, WAITING):
        for state in states:
            if state in wanted:
                return state
    return next((state for state in states if state != "COMPLETED"), states[0] if states else GONE)
