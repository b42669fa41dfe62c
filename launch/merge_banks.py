"""`m3 bank merge`: take all memories of another bank into one, without encoding.

    m3 bank build --checkpoint run --references S --output other --codec-from bank
    m3 data edit-references --references R --append S --output R2
    m3 bank merge --bank bank --other other --references R2

R is the bank's knowledge base, S the other's. Both banks must be of the same model with the same codec and memory
settings. The other's references get the next free ids, in order. Its shards are shared (hard links) where the file
system allows; it stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_m3.config import parse
from megatron_m3.errors import exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Which banks, and the knowledge base of both."""

    bank: str
    """Folder of the bank that gets the memories."""
    other: str
    """Folder of the bank that they are taken from."""
    references: str
    """Folder of the bank's knowledge base with the other's appended, made by `m3 data edit-references --append`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Merge, and say what was taken."""
    options = parse(MergeOptions, argv, "m3 bank merge", __doc__ or "")
    from megatron_m3.platform import select

    select()
    from megatron_m3.memory.update import merge_bank

    print(merge_bank(Path(options.bank), Path(options.other), Path(options.references)))


if __name__ == "__main__":
    exit_on_user_error(main)
