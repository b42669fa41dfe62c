"""`m3 bank inspect`: what a bank holds; with a reference, its text and the tokens that each layer and head kept.

    m3 bank inspect --bank bank
    m3 bank inspect --bank bank --references references --tokenizer tokenizer --reference 42
    m3 bank inspect --bank bank --references references --checkpoint run --reference 42

With --checkpoint the reference is encoded again, and the error of its memory as the bank has it is told: of the keys
and of the values of each layer and head, the norm of the difference as a share of the norm.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.memory.bank import MemoryBank
    from megatron_m3.memory.types import ExplicitMemories
    from megatron_m3.references import ReferenceStore
    from megatron_m3.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Which bank, and which reference of it."""

    bank: str
    """Folder of the bank."""
    reference: int | None = None
    """Id of one reference whose memory is shown; none shows the bank as a whole."""
    references: str = ""
    """Folder of the knowledge base, for the reference's text."""
    tokenizer: str = ""
    """Folder of the tokenizer, for the reference's tokens; not needed with --checkpoint."""
    checkpoint: str = ""
    """The checkpoint that the bank was built with, or the folder of its run: tells the error of the memory."""
    json: bool = False
    """Print JSON: what the bank says of itself."""

    def __post_init__(self) -> None:
        if self.json and self.reference is not None:
            raise ConfigError("json: a reference's memory is told as text; leave --json out")
        if self.checkpoint and self.reference is None:
            raise ConfigError("checkpoint: one reference is encoded again; add --reference")
        if self.reference is not None and not (self.references and (self.tokenizer or self.checkpoint)):
            missing = "tokenizer" if self.references else "references"
            raise ConfigError(f"{missing}: missing; --reference needs --references and --tokenizer")


def main(argv: Sequence[str] | None = None) -> None:
    """Show a bank, or the memory of one reference."""
    options = parse(InspectOptions, argv, "m3 bank inspect", __doc__ or "")
    from megatron_m3.platform import select

    select()
    from megatron_m3.memory.bank import MemoryBank

    bank = MemoryBank.open(options.bank)
    if options.reference is not None:
        print("\n".join(describe_reference(bank, options)))
    elif options.json:
        json.dump(bank_facts(bank), sys.stdout, indent=2)
        print()
    else:
        print("\n".join(f"{name:<20}{value}" for name, value in bank_facts(bank).items()))


def bank_facts(bank: "MemoryBank") -> dict[str, object]:
    """What a bank says of itself, and its size."""
    settings = dataclasses.asdict(bank.settings) | {
        "memory_layers": ",".join(map(str, bank.settings.memory_layers)), "edits": len(bank.places.edits.folders),
        "edited": len(bank.places.ids), "deleted": len(bank.places.deleted)}
    size = {"record_bytes": bank.record_bytes, "bytes": bank.record_bytes * len(bank), "hash": bank.hash}
    return settings | size | {f"{role}_hash": value for role, value in bank.manifest.inputs.items()}


def describe_reference(bank: "MemoryBank", options: InspectOptions) -> Iterator[str]:
    """The reference's text, then for every layer and head its tokens with the kept ones in brackets, and norms."""
    from megatron_m3.manifest import check_input
    from megatron_m3.references import ReferenceStore
    from megatron_m3.tokenizer import Tokenizer

    assert options.reference is not None
    references, fresh = ReferenceStore.open(options.references), None
    check_input(bank.address, bank.manifest, "references", references.hash)
    document, first_token = references.source(options.reference)
    if options.checkpoint:
        tokenizer, fresh = encode_again(bank, references, options)
    else:
        tokenizer = Tokenizer.load(options.tokenizer)
    check_input(bank.address, bank.manifest, "tokenizer", tokenizer.hash)
    memory = bank.read([options.reference])
    tokens, lengths = references.tokens([options.reference])
    words = [tokenizer.decode([token]) for token in tokens[0, : lengths[0]]]
    yield f"reference {options.reference}, document {document}, from token {first_token}, {len(words)} tokens:"
    yield references.text(options.reference)
    if not memory.num_kept[0]:
        yield "deleted: its memory holds no token"
        return
    norms = memory.kv[0, ..., : int(memory.num_kept[0]), :].norm(dim=-1).mean(-1)
    for place, layer in enumerate(bank.settings.memory_layers):
        for head in bank.settings.memory_lists[place].nonzero().flatten().tolist():
            kept = set(memory.kept_positions(0)[place, head].tolist())
            text = "".join(f"[{word}]" if at in kept else word for at, word in enumerate(words)).replace("\n", " ")
            key, value = norms[place, :, head].tolist()
            error = ""
            if fresh is not None:
                whole, wrong = (one[0, place, :, head].square().sum((-2, -1)).sqrt()
                                for one in (fresh.kv, memory.kv - fresh.kv))
                off = (wrong / whole.clamp_min(1e-30)).tolist()
                error = f" error of key {off[0]:.1%} of value {off[1]:.1%}"
            yield f"layer {layer} head {head}  |key| {key:.2f} |value| {value:.2f}{error}  {text}"


def encode_again(
    bank: "MemoryBank", references: "ReferenceStore", options: InspectOptions
) -> tuple["Tokenizer", "ExplicitMemories"]:
    """The model's tokenizer, and the reference's memory as the model writes it."""
    import torch

    from megatron_m3.memory import encode_references
    from megatron_m3.memory.verify import check_origin
    from megatron_m3.model.checkpoint import describe_model, load_model

    torch.set_num_threads(1)
    folder = Path(options.checkpoint)
    check_origin(bank, describe_model(folder), references)
    loaded = load_model(folder)
    loaded = dataclasses.replace(loaded, config=bank.configure(loaded.config))
    return loaded.tokenizer, encode_references(loaded, *references.tokens([options.reference or 0]))


if __name__ == "__main__":
    exit_on_user_error(main)
