"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd on loopback, in a folder of their own."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.launcher import ROOT, free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "setpriv")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
DEADLINE = 600
"""Seconds; far more than anything here takes on a machine that does nothing else."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=pmi2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=0
KillWait=2
MinJobAge=86400
InactiveLimit=0
MessageTimeout=60
SlurmdTimeout=600
BatchStartTimeout=600
OverTimeLimit=10
MailProg=/bin/true
GresTypes=gpu
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=600 MaxTime=60 OverSubscribe=NO
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty where one can."""
    missing = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    if missing:
        return f"Slurm is not installed (no {', '.join(missing)}): make slurm-packages"
    return "" if os.geteuid() == 0 else "starting a Slurm of its own needs root"


@dataclass
class Cluster:
    """A running Slurm."""

    folder: Path
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands talk to this cluster, and to no other."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def run(self, *command: object, check: bool = True, cwd: Path = ROOT) -> str:
        """Output of a command; its errors are in the message when it fails."""
        done = subprocess.run([str(word) for word in command], env=self.environment, cwd=cwd, text=True,
                              capture_output=True, timeout=DEADLINE, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: object) -> str:
        """Number of the job that sbatch makes of ``words``."""
        return self.run("sbatch", "--parsable", *words)

    def jobs(self, number: str) -> list[dict[str, str]]:
        """What Slurm says of a job, or of each element of an array."""
        lines: list[str] = []

        def is_told() -> bool:  # a busy controller may drop a connection
            lines[:] = self.run("scontrol", "--oneliner", "show", "job", number, check=False).splitlines()
            return bool(lines)
        wait_until(is_told, f"job {number} is not known")
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line]

    def wait_for(self, number: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of ``states``; the log of one that ended otherwise is in the message."""
        def reached() -> bool:
            found = {job["JobState"] for job in self.jobs(number)}
            assert not found & set(ENDED) - set(states), f"job {number}: {found}\n{self.log(number)}"
            return found <= set(states)
        wait_until(reached, f"job {number} did not become {states}", interval=0.3)
        return self.jobs(number)[0]

    def log(self, number: str) -> str:
        """What a job has printed."""
        path = Path(self.jobs(number)[0]["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def begin_now(self, number: str) -> None:
        """Spare a job that went back into the queue the pause of two minutes, but for what a node takes to end it."""
        if self.wait_for(number, "PENDING", "COMPLETED")["JobState"] == "PENDING":
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now+2")

    def preempt(self, *numbers: str) -> None:
        """Give both nodes to another job that is more urgent; afterwards the jobs begin again."""
        urgent = self.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
        self.wait_for(urgent, "COMPLETED")
        for number in numbers:
            self.begin_now(number)

    def start(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground of a session of its own; it ends with this process, however that ends."""
        guarded = ["setpriv", "--pdeathsig", "TERM", str(shutil.which(command[0], path=PATH)), *command[1:]]
        with (self.folder / f"{name}.out").open("w") as output:
            self.processes[name] = subprocess.Popen(guarded, env=self.environment, start_new_session=True,
                                                    stdout=output, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        """Cancel all jobs, end the daemons that were started here, and wait for them."""
        if "slurmctld" in self.processes:
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
        for name in reversed(self.processes):
            process = self.processes[name]
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def write_configuration(folder: Path, munge: Path, gpus: int) -> None:
    """slurm.conf with free ports; two nodes of two processors each, and of so many files that stand for GPUs."""
    host = socket.gethostname().split(".")[0]
    devices = [folder / f"gpu{number}" for number in range(gpus)]
    for path in devices:
        path.touch()
    if devices:
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={path}\n" for path in devices))
    nodes = "\n".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 Gres=gpu:{gpus} "
        "State=UNKNOWN" for number in (1, 2)
    )
    text = CONF.format(host=host, folder=folder, munge=munge, ctld_port=free_port(), slurmd_port=free_port(),
                       nodes=nodes)
    (folder / "slurm.conf").write_text(text)


def wait_until(condition, what: str, deadline: float = DEADLINE, interval: float = 0.05) -> None:
    """Wait for ``condition``."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(interval)


@contextmanager
def slurm_cluster(folder: Path, gpus: int = 0) -> Iterator[Cluster]:
    """A Slurm in ``folder`` for the length of a block; nothing of it is left afterwards."""
    munge, key = folder / "munge.socket", folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "state").mkdir()
    write_configuration(folder, munge, gpus)
    cluster = Cluster(folder)
    try:
        cluster.start("munged", "munged", "--foreground", "--force", f"--socket={munge}", f"--key-file={key}",
                      f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid",
                      f"--seed-file={folder}/munged.seed")
        wait_until(munge.exists, "munged did not start")
        cluster.start("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            cluster.start(node, "slurmd", "-D", "-N", node)
        wait_until(lambda: cluster.run("sinfo", "-hNp", "low", "-o", "%t", check=False).split() == ["idle", "idle"],
                   "the nodes did not come up")
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def own_cluster() -> Iterator[Cluster]:
    """A Slurm for the length of a block, in a folder near the root, for a socket's path is short."""
    folder = Path(tempfile.mkdtemp(prefix="m3slurm_", dir="/tmp"))
    try:
        with slurm_cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
