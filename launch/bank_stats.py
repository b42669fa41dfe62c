"""`m3 bank stats`: bytes and edits of a bank, and of a sample which tokens are kept, where, and how long keys are.

    m3 bank stats --bank bank
    m3 bank stats --bank bank --references references --tokenizer tokenizer --plot bank.png
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.evaluation.bank_stats import BankStats


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Which bank, and how much of it."""

    bank: str
    """Folder of the bank."""
    references: str = ""
    """Folder of the bank's knowledge base: places become relative to each reference's length."""
    tokenizer: str = ""
    """With --references: folder of the tokenizer, to tell which tokens are kept."""
    sample: int = 1000
    """References that are read, drawn uniformly; all if there are no more."""
    seed: int = 0
    """Draw of the sample."""
    plot: str = ""
    """PNG file to write."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ConfigError(f"sample={self.sample}: must be at least 1")
        if self.tokenizer and not self.references:
            raise ConfigError("references: missing; --tokenizer needs them")
        if self.plot and Path(self.plot).suffix.lower() != ".png":
            raise ConfigError(f"plot={self.plot}: must end in .png")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    options = parse(StatsOptions, argv, "m3 bank stats", __doc__ or "")
    from megatron_m3.platform import select

    select()
    from megatron_m3.evaluation.bank_stats import measure_bank
    from megatron_m3.manifest import check_input
    from megatron_m3.memory.bank import MemoryBank
    from megatron_m3.memory.verify import draw_sample
    from megatron_m3.references import ReferenceStore
    from megatron_m3.tokenizer import Tokenizer

    bank = MemoryBank.open(options.bank)
    references = ReferenceStore.open(options.references) if options.references else None
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    for role, given in (("references", references), ("tokenizer", tokenizer)):
        if given:
            check_input(bank.address, bank.manifest, role, given.hash)
    stats = measure_bank(bank, draw_sample(options.sample, len(bank), options.seed), references, tokenizer)
    if options.plot:
        from megatron_m3.evaluation.bank_plot import plot_bank

        plot_bank(Path(options.plot), stats, Path(options.bank).name)
    if options.json:
        json.dump(asdict(stats) | {"bytes": stats.bytes}, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(describe(stats)))


def describe(stats: "BankStats") -> Iterator[str]:
    """The statistics as text."""
    yield f"{stats.references:,} references, {stats.bytes:,} bytes:"
    for name, size in stats.parts.items():
        yield f"  {name:<30}{size:>16,}{size / max(1, stats.bytes):>8.1%}"
    yield f"edits {stats.edits}, of {stats.edited:,} references, {stats.deleted:,} of them deleted"
    kept = ", ".join(f"{count:,} keep {kept}" for kept, count in stats.kept_tokens.items())
    yield f"of {stats.sample:,} references drawn, {kept} tokens in each head of a layer"
    mean = [sum(column) / len(stats.places) for column in zip(*stats.places, strict=True)]
    what = "its own length" if stats.relative_to_length else "the longest"
    yield f"kept tokens by place in a reference, as shares of {what}, first to last:"
    yield "  " + " ".join(f"{share:.1%}" for share in mean)
    yield f"{'layer':>5}  mean length of keys, by head        of values"
    for layer, keys, values in zip(stats.layers, stats.key_norms, stats.value_norms, strict=True):
        yield f"{layer:>5}  {_norms(keys):<36}{_norms(values)}"
    if stats.tokens:
        yield f"{'':<18}{'of what is kept':>16}{'of the text':>13}"
        for kind, (kept_share, text_share) in stats.kinds.items():
            yield f"{kind:<18}{kept_share:>16.1%}{text_share:>13.1%}"
        for token in stats.tokens:
            yield f"{token.text!r:<18}{token.kept_share:>16.2%}{token.text_share:>13.2%}"


def _norms(row: list[float | None]) -> str:
    return " ".join("     -" if norm is None else f"{norm:6.2f}" for norm in row)


if __name__ == "__main__":
    exit_on_user_error(main)
