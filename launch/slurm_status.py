"""m3 slurm status CHAIN.yaml: where a chain stands, how fast it goes, and why a job waits or has failed."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ckpt_convert.words import parse_words
from launch.slurm_chain import Chain, Step, load_chain
from launch.slurm_jobs import GONE, WAITING, Job, Submitted, jobs_of, joint_state, read_state
from megatron_m3.errors import exit_on_user_error

REASONS = {
    "Dependency": "waits for the steps before it",
    "DependencyNeverSatisfied": "a step before it failed",
    "Resources": "waits for nodes to become free",
    "Priority": "others stand before it in the queue",
    "BeginTime": "back in the queue, and begins after a pause",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "PartitionConfig": "asks for more than the partition has",
    "PartitionNodeLimit": "asks for more nodes than the partition allows",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "JobHeldUser": "held; scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "OutOfMemory": "took more memory than it asked for",
    "NonZeroExitCode": "its script failed",
    "TimeLimit": "its time was up",
    "NodeDown": "a node died",
}
"""Slurm's reasons in words."""
NOISE = ("srun:", "slurmstepd")
"""Beginnings of log lines that say less than others."""
TAIL = 30
"""Last lines of a log among which a user's mistake is looked for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to show."""

    chain: str
    """YAML file of the chain."""
    set: tuple[str, ...] = ()
    """Variables of the chain as they were given to m3 slurm submit."""
    json: bool = False
    """Print the steps as JSON."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one step stands."""

    step: str
    state: str
    """finished, ended (a server), not submitted, or Slurm's word in small letters."""
    job: str = ""
    why: str = ""
    """Why it waits or has failed."""
    nodes: str = ""
    elapsed: str = ""
    restarts: int = 0
    """Times that it went back into the queue."""
    line: str = ""
    """The last step line of a training, or the log's last line that says something."""
    tokens_per_second: float | None = None
    """Of a training's last step."""
    log: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Print where every step stands."""
    options = parse_words(Options, argv, "m3 slurm status", __doc__ or "", ("chain",))
    chain = load_chain(Path(options.chain), options.set)
    state = read_state(chain)
    standings = [stand(chain, step, state.get(step.name)) for step in chain.steps]
    if options.json:
        json.dump([asdict(one) for one in standings], sys.stdout, indent=1)
        print()
        return
    width = max(len(one.step) for one in standings)
    for one in standings:
        facts = [f"job {one.job}" * bool(one.job), one.nodes and f"on {one.nodes}", one.elapsed, one.why,
                 f"back in the queue {one.restarts} times" * bool(one.restarts)]
        print(f"{one.step:<{width}}  {one.state:<15}{', '.join(filter(None, facts))}".rstrip())
        if one.line:
            print(f"{'':<{width}}    {one.line}")
    ended = sum(one.state == "finished" for one in standings)
    print(f"{ended} of {len(standings)} steps finished; logs in {chain.folder}")


def stand(chain: Chain, step: Step, submitted: Submitted | None) -> Standing:
    """Where a step stands, from Slurm, its artifact, its metrics and its log."""
    jobs = jobs_of(chain, step, submitted)
    active = any(job.is_active for job in jobs)
    if submitted is None or (submitted.hash != step.hash and not active):
        return Standing(step=step.name, state="not submitted",
                        why="its settings are other than those submitted" * bool(submitted))
    if step.is_made and not active:
        return Standing(step=step.name, state="finished")
    state = joint_state(jobs)
    if state in ("COMPLETED", GONE) and not step.makes:
        return Standing(step=step.name, state="ended", job=submitted.job, why="submit the chain to start it anew")
    if state in ("COMPLETED", GONE):
        why = "Slurm has forgotten the job" if state == GONE else "ended well"
        missing = next((path for path in step.makes if not path.exists()), step.makes[0])
        return Standing(step=step.name, state="failed", job=submitted.job, why=f"{why}, but {missing} is not whole",
                        line=last_line(step, submitted, is_failed=True), log=str(step.log))
    job = next(one for one in jobs if one.state == state)
    reasons = [explain(job), "submitted with other settings" * (submitted.hash != step.hash)]
    metrics = last_metrics(step)
    return Standing(
        step=step.name, state=state.lower(), job=submitted.job, why=", ".join(filter(None, reasons)), nodes=job.nodes,
        elapsed=job.elapsed if job.state not in WAITING else "", restarts=int(job.restarts),
        line="" if job.state in WAITING and job.restarts == "0" else last_line(step, submitted, is_failed=not active),
        tokens_per_second=metrics["tokens_per_second"] if metrics else None, log=str(step.log),
    )


def explain(job: Job) -> str:
    """Why a job waits or has failed, in words."""
    reason = job.reason.split(",")[0].lstrip("(").rstrip(")")
    words = REASONS.get(reason, reason)
    if job.is_active or job.state in ("CANCELLED", "NODE_FAIL"):
        return words
    status, _, signal = job.exit_code.partition(":")
    ended = f"signal {signal}" if signal not in ("", "0") else f"exit status {status}"
    return f"{words} ({ended})" if words else ended


def last_metrics(step: Step) -> dict[str, float] | None:
    """The last step that a training recorded beside its checkpoints."""
    path = step.makes[0].parent / "metrics.jsonl" if step.makes else None
    if path is None or not path.is_file():
        return None
    for line in reversed(path.read_text().splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record and "event" not in record:
            return dict(record)
    return None


def last_line(step: Step, submitted: Submitted, *, is_failed: bool = False) -> str:
    """The last step line of a training; where there is none or it failed, the log's last mistake, or its last line."""
    metrics = last_metrics(step)
    if metrics is not None and not is_failed:
        from megatron_m3.training.metrics import step_line

        return step_line(metrics)
    pattern = step.log.name.replace("%j", submitted.job).replace("%A", submitted.job).replace("%a", "*")
    for path in sorted(step.log.parent.glob(pattern), key=lambda log: log.stat().st_mtime, reverse=True):
        lines = [line for line in path.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
        told = [line for line in lines[-TAIL:] if line.startswith("error: ")]
        telling = told or [line for line in lines if not line.startswith(NOISE)] or lines
        return telling[-1] if telling else ""
    return ""


if __name__ == "__main__":
    exit_on_user_error(main)
