"""`m3 bank add`: encode the references that were added to a bank's knowledge base, and refuse any other edit of it.

    m3 data edit-references --references R --output R2 --add new.jsonl --tokenizer tokenizer
    m3 bank add --bank bank --references R2 --checkpoint run

The first command adds the texts, under the next free ids, the second one their memories. It is `m3 bank update`, which
follows every edit, with a check that references were only added; under mpiexec, run that.
"""

from collections.abc import Sequence

from launch.update_bank import run
from megatron_m3.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Add references to a bank."""
    run(argv, "add", __doc__ or "", "add")


if __name__ == "__main__":
    exit_on_user_error(main)
