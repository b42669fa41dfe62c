"""`m3 bank verify`: check every checksum of a bank.

    m3 bank verify --bank bank
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_m3.config import parse
from megatron_m3.errors import exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Which bank."""

    bank: str
    """Folder of the bank."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read a whole bank and say that it is what was written, or name the first damaged file."""
    options = parse(VerifyOptions, argv, "m3 bank verify", __doc__ or "")
    from megatron_m3.platform import select

    select()
    from megatron_m3.memory.bank import MemoryBank

    bank = MemoryBank.open(options.bank, check=True)
    print(f"{options.bank}: whole; {len(bank):,} memories in {bank.settings.num_blocks:,} shards")


if __name__ == "__main__":
    exit_on_user_error(main)
