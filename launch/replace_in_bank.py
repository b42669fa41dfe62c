"""`m3 bank replace`: encode anew the references that were replaced in a bank's knowledge base, and refuse other edits.

    m3 data edit-references --references R --output R2 --replace 5,9 --by texts.jsonl --tokenizer tokenizer
    m3 bank replace --bank bank --references R2 --checkpoint run

The first command replaces the texts, which keep their ids, the second one their memories. It is `m3 bank update`, which
follows every edit, with a check that references were only replaced; under mpiexec, run that.
"""

from collections.abc import Sequence

from launch.update_bank import run
from megatron_m3.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Replace memories of a bank."""
    run(argv, "replace", __doc__ or "", "replace")


if __name__ == "__main__":
    exit_on_user_error(main)
