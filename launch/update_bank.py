"""`m3 bank update`: bring a bank to an edited knowledge base, encoding only what was added or replaced there.

    m3 data edit-references --references R --output R2 --add new.jsonl --delete 3,7 --tokenizer tokenizer
    m3 bank update --bank bank --references R2 --checkpoint run
    mpiexec -n 8 python -m launch.update_bank --bank bank --references R2 --checkpoint run

R2 must descend from the bank's knowledge base, over any number of edits. New memories are coded with the bank's own
codec and stand in files of their own, a deleted reference's memory is empty; `m3 bank compact` folds both into the
shards. Readers of the bank go on. A stopped update leaves the bank as it was, and goes on when the command is given
again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.build_bank import load_alone, run_on_ranks, settle
from megatron_m3.config import parse
from megatron_m3.errors import exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.memory.update import Only


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Which bank, and what it becomes a bank of."""

    bank: str
    """Folder of the bank."""
    references: str
    """Folder of the edited knowledge base, made by `m3 data edit-references`."""
    checkpoint: str
    """The checkpoint that the bank was built with, or the folder of its run, whose newest one is taken."""


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(EncodeOptions):
    """The same, where nothing may be left to encode."""

    checkpoint: str = ""
    """The checkpoint that the bank was built with, or the folder of its run, whose newest one is taken; not needed
    where references were only deleted."""


def main(argv: Sequence[str] | None = None) -> None:
    """Update a bank together with the other ranks."""
    run(argv, "update", __doc__ or "")


def run(argv: Sequence[str] | None, word: str, help: str, only: "Only" = "") -> None:
    """The job under the name ``m3 bank WORD``; ``only`` refuses edits of another kind."""

    def do(options: EncodeOptions, comm: Any) -> str | None:
        import torch.distributed as dist

        settle(comm)
        from megatron_m3.memory.update import update_bank
        from megatron_m3.platform.distributed import shut_down

        had_world = dist.is_initialized()
        checkpoint = Path(options.checkpoint) if options.checkpoint else None
        line = update_bank(Path(options.bank), Path(options.references), checkpoint, comm, load_alone, only=only,
                           command=f"m3 bank {word}")
        if not had_world:
            shut_down()
        return line

    run_on_ranks(lambda: parse(EncodeOptions if only else UpdateOptions, argv, f"m3 bank {word}", help), do)


if __name__ == "__main__":
    exit_on_user_error(main)
