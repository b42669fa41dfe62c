"""m3 slurm submit CHAIN.yaml: submit the jobs of a chain, each to begin when those before it have ended well.

What is finished is not done again, what waits or runs is left alone: the same command goes on with a chain that
stopped. The scripts, logs and numbers of the jobs lie in the folder slurm of the chain's output.

    m3 slurm submit slurm/chains/demo-small.yaml --dry-run          the scripts, and nothing else
    m3 slurm submit slurm/chains/demo-small.yaml --set train_entries=3000,warmup_steps=20
"""

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckpt_convert.words import parse_words
from launch.slurm_chain import ROOT, Chain, Step, load_chain
from launch.slurm_jobs import Submitted, alone, check_slurm, complaint, jobs_of, read_state, run_slurm, write_state
from megatron_m3.errors import M3Error, exit_on_user_error
from megatron_m3.manifest import atomic_path


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to submit."""

    chain: str
    """YAML file of the chain; launch/slurm_chain.py explains its fields."""
    set: tuple[str, ...] = ()
    """Variables of the chain to replace: NAME=VALUE, separated by commas."""
    dry_run: bool = False
    """Show the scripts and submit nothing."""
    json: bool = False
    """Print the steps as JSON."""


class Outcome(NamedTuple):
    """What was done about one step."""

    step: Step
    done: str
    """finished, left alone or submitted."""
    job: str
    """Number of its job, or nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Submit what is missing of a chain, and print its graph."""
    options = parse_words(Options, argv, "m3 slurm submit", __doc__ or "", ("chain",))
    chain = load_chain(Path(options.chain), options.set)
    if options.dry_run:
        print("\n".join(f"# ---- {step.name}{_after(step)}\n{step.script}" for step in chain.steps))
        return
    check_slurm()
    with alone(chain):
        outcomes = submit(chain)
    if options.json:
        json.dump([{"step": one.step.name, "after": one.step.after, "done": one.done, "job": one.job}
                   for one in outcomes], sys.stdout, indent=1)
        print()
    else:
        width = max(len(one.step.name) for one in outcomes)
        for one in outcomes:
            job = f"job {one.job}, {one.done}" if one.job else one.done
            print(f"{one.step.name:<{width}}  {job:<24}{_after(one.step)}".rstrip())


def _after(step: Step) -> str:
    return f"  after {', '.join(step.after)}" if step.after else ""


def submit(chain: Chain) -> list[Outcome]:
    """Submit every step that is neither finished nor waiting or running.

    Raises:
        M3Error: sbatch refuses a job, or a job of a step runs that was submitted with other settings.
    """
    state, outcomes, numbers = read_state(chain), [], dict[str, str]()
    write_state(chain, state)
    for step in chain.steps:
        before, jobs = state.get(step.name), jobs_of(chain, step, state.get(step.name))
        same = before is not None and before.hash == step.hash
        if before and any(job.is_active for job in jobs):
            if not same:
                raise M3Error(f"{step.name}: job {before.job} was submitted with other settings and has not ended; "
                              f"wait for it, or scancel {before.job}")
            numbers[step.name] = before.job
            outcomes.append(Outcome(step, "left alone", before.job))
        elif same and step.is_made:
            outcomes.append(Outcome(step, "finished", ""))
        else:
            _submit_step(chain, step, state, [numbers[name] for name in step.after if name in numbers])
            numbers[step.name] = state[step.name].job
            outcomes.append(Outcome(step, "submitted", numbers[step.name]))
    return outcomes


def _submit_step(chain: Chain, step: Step, state: dict[str, Submitted], after: Sequence[str]) -> None:
    """Submit a step; its mark is written before, so that the job is found again whatever ends this command."""
    path = chain.folder / f"{step.name}.sbatch"
    with atomic_path(path) as temporary:
        temporary.write_text(step.script)
    waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    state[step.name] = Submitted(job="", hash=step.hash, mark=secrets.token_hex(8))
    write_state(chain, state)
    done = run_slurm("sbatch", "--parsable", f"--chdir={ROOT}", *waits, str(path), state[step.name].mark)
    if done.returncode:
        raise M3Error(f"{step.name}: sbatch refuses it ({complaint(done)}); mend the step's slurm options, or SBATCH_ "
                      f"variables; the script is {path}")
    state[step.name] = Submitted(job=done.stdout.strip().split(";")[0], hash=step.hash)
    write_state(chain, state)


if __name__ == "__main__":
    exit_on_user_error(main)
