"""`m3 bank compact`: fold what was edited into a bank's shards, and remove the files that are no longer needed.

    m3 bank compact --bank bank

Afterwards the shards hold what a bank built anew from the edited knowledge base with the same codec holds. Only shards
with an edit are written anew; they need room beside the old ones meanwhile. Readers of the bank go on. Killed, it
leaves the bank as it was, and goes on where it was when the command is given again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_m3.config import parse
from megatron_m3.errors import exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class CompactOptions:
    """Which bank."""

    bank: str
    """Folder of the bank."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compact, and say what came of it."""
    options = parse(CompactOptions, argv, "m3 bank compact", __doc__ or "")
    from megatron_m3.platform import select

    select()
    from megatron_m3.memory.editing import compact_bank

    print(compact_bank(options.bank))


if __name__ == "__main__":
    exit_on_user_error(main)
