"""`m3 bank verify`: check every checksum of a bank, or that a sample of it is what its model writes, or both.

    m3 bank verify --bank bank
    m3 bank verify --bank bank --sample 100 --checkpoint run --references references
    m3 bank verify --bank bank --sample 100 --checkpoint run --references references --all

With --sample, references are drawn uniformly, encoded again and passed through the bank's codec; their records must be
the same bit for bit. Of the bank only their records are read then, unless --all asks for every checksum too. Where the
bank was built on another machine, or by tensor-parallel groups, last bits may differ: --tolerance 0.01 accepts decoded
keys and values that are 1 % off, of the same tokens. Exit status 1 tells that records differ.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.build_bank import FOR_ONE_THREAD
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.memory.bank import MemoryBank
    from megatron_m3.memory.verify import SampleReport

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Which bank, and what of it."""

    bank: str
    """Folder of the bank."""
    sample: int = 0
    """References that are encoded again and compared with their records; 0 compares checksums alone."""
    all: bool = False
    """With --sample: compare every checksum of the bank, too."""
    checkpoint: str = ""
    """With --sample: the checkpoint that the bank was built with, or the folder of its run."""
    references: str = ""
    """With --sample: folder of the knowledge base that the bank was built from."""
    seed: int = 0
    """Draw of the sample."""
    tolerance: float = 0.0
    """With --sample: largest error of a head's decoded keys or values of a reference, as a share of their length, that
    is accepted where the tokens are the same; 0 accepts only the same bits."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.sample < 0:
            raise ConfigError(f"sample={self.sample}: must be 0 or more")
        if not 0 <= self.tolerance < math.inf:
            raise ConfigError(f"tolerance={self.tolerance}: must be 0 or more, and finite")
        for name in ("checkpoint", "references"):
            if self.sample and not getattr(self, name):
                raise ConfigError(f"{name}: missing; --sample needs --checkpoint and --references")
            if getattr(self, name) and not self.sample:
                raise ConfigError(f"{name}: only a sample is compared with it; add --sample 100")
        if self.all and not self.sample:
            raise ConfigError("all: every checksum is compared already; it goes with --sample")
        if self.tolerance and not self.sample:
            raise ConfigError("tolerance: checksums have none; add --sample 100")


def main(argv: Sequence[str] | None = None) -> None:
    """Say that a bank is what was written, or name the first damaged file; compare a sample if asked."""
    options = parse(VerifyOptions, argv, "m3 bank verify", __doc__ or "")
    for name in FOR_ONE_THREAD:  # as in the build: last bits depend on the number of threads
        os.environ[name] = "1"
    from megatron_m3.platform import select

    select()
    from megatron_m3.memory.bank import MemoryBank

    is_read = options.all or not options.sample
    bank = MemoryBank.open(options.bank, check=is_read)
    found: dict[str, Any] = {"bank": options.bank, "memories": len(bank), "shards": bank.settings.num_blocks,
                             "checksums": is_read}
    if not options.json:
        state = "whole" if is_read else "all files have their sizes"
        print(f"{options.bank}: {state}; {len(bank):,} memories in {bank.settings.num_blocks:,} shards", flush=True)
    is_right = True
    if options.sample:
        report = _verify_sample(bank, options)
        is_right = report.is_within(options.tolerance)
        found["sample"] = asdict(report) | {"tolerance": options.tolerance, "accepted": is_right}
        if not options.json:
            print(f"{options.bank}: {_describe(report, options.tolerance)}")
    if options.json:
        print(json.dumps(found, indent=2))
    if not is_right:
        sys.exit(1)


def _verify_sample(bank: "MemoryBank", options: VerifyOptions) -> "SampleReport":
    import torch

    from megatron_m3.memory.verify import check_origin, draw_sample, verify_sample
    from megatron_m3.model.checkpoint import describe_model, load_model
    from megatron_m3.references import ReferenceStore

    torch.set_num_threads(1)
    folder, references = Path(options.checkpoint), ReferenceStore.open(options.references)
    check_origin(bank, describe_model(folder), references)
    ids = draw_sample(options.sample, len(bank), options.seed)
    return verify_sample(bank, load_model(folder), references, ids, tolerance=options.tolerance)


def _describe(report: "SampleReport", tolerance: float) -> str:
    which = f"{report.references:,} references drawn and encoded again"
    if not report.different:
        return f"{which}: the same bits"
    names = ", ".join(map(str, report.different[:SHOWN])) + ", …" * (len(report.different) > SHOWN)
    accepted = f"within the tolerance {tolerance:g}" if report.is_within(tolerance) else "NOT what the model writes"
    return (f"{which}: {len(report.different):,} differ ({names}), in {report.different_lists:,} of {report.lists:,} "
            f"heads, of which {report.other_tokens:,} keep other tokens; largest relative error of decoded keys or "
            f"values {report.largest_error:.2g}; {accepted}")


if __name__ == "__main__":
    exit_on_user_error(main)
