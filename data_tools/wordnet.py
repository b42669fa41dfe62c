"""m3 data wordnet: the demo's texts from the WordNet glosses that come with the project.

train.jsonl       documents of neighbouring entries of a category, each said as "The word X means GLOSS."
references.jsonl  the knowledge base: "X: GLOSS" lines in alphabetical order, several to a reference
heldout.jsonl     lines to score: entries that no training document says, and the reference that holds each
prompts.jsonl     openings to generate from, of held-out and of trained words
"""

import gzip
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.documents import show_counts
from data_tools.texts import write_texts
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import Manifest, hash_file, is_finished

KIND, SCHEMA = "texts", 1
CORPUS = Path(__file__).parent / "corpus" / "wordnet"
SHORTEST_HELDOUT = 20
"""Characters; shorter glosses say too little to be scored."""
NUM_PROMPTS = 4
"""Prompts of held-out words, and as many of trained words."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    output: str
    """Folder to write; it must not exist, or be empty."""
    train_entries: int = 0
    """About how many entries the training documents say; 0 is all."""
    heldout: int = 300
    """Entries that are held out of the training documents and scored."""
    other_entries: int = 0
    """About how many entries only the knowledge base holds."""
    document_entries: int = 24
    """Entries in a training document."""
    longest_gloss: int = 160
    """Characters; entries with longer ones (at 160 these are 4 %) are left out."""
    reference_characters: int = 360
    """Most characters in a reference, at least 2 longest glosses; 360 keep nearly all below 128 tokens."""

    def __post_init__(self) -> None:
        for name, least in (("train_entries", 0), ("heldout", 0), ("other_entries", 0), ("document_entries", 1),
                            ("longest_gloss", SHORTEST_HELDOUT), ("reference_characters", 2 * self.longest_gloss)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")


class Entry(NamedTuple):
    """One meaning of a word."""

    id: str
    word: str
    gloss: str
    category: str

    @property
    def line(self) -> str:
        """How a reference says it."""
        return f"{self.word}: {self.gloss}"

    @property
    def opening(self) -> str:
        """How a training document begins to say it."""
        return f"The word {self.word} means"

    @property
    def sentence(self) -> str:
        """How a training document says it."""
        return f"{self.opening} {self.gloss}."


def load_entries(folder: Path, longest_gloss: int) -> list[Entry]:
    """The entries of the corpus whose gloss has at most ``longest_gloss`` characters, in its order.

    Raises:
        DataError: the file is missing or not what the project ships.
    """
    path = folder / "entries.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        entries = [Entry(row["id"], row["words"][0], row["gloss"], row["category"]) for row in rows]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not the WordNet corpus ({error}); get it again from the project") from None
    return [entry for entry in entries if len(entry.gloss) <= longest_gloss]


def hash_order(entry: Entry, key: str = "") -> bytes:
    """Sort key for an order that is fixed and follows nothing: the hash of the entry's id."""
    return hashlib.sha256((key + entry.id).encode()).digest()


def make_documents(entries: Sequence[Entry], size: int) -> list[tuple[Entry, ...]]:
    """Runs of ``size`` neighbouring entries of one category."""
    groups = itertools.groupby(entries, key=lambda entry: entry.category)
    return [batch for _, group in groups for batch in itertools.batched(group, size)]


def choose_heldout(pool: Sequence[Entry], everything: Sequence[Entry], count: int) -> list[Entry]:
    """Entries of ``pool`` to hold out: of those whose word and gloss occur once in ``everything``, by hash of id."""
    words = Counter(entry.word.casefold() for entry in everything)
    glosses = Counter(entry.gloss.casefold() for entry in everything)
    clear = [
        entry
        for entry in pool
        if words[entry.word.casefold()] == glosses[entry.gloss.casefold()] == 1 and len(entry.gloss) >= SHORTEST_HELDOUT
    ]
    if len(clear) < count:
        raise ConfigError(f"heldout={count}: only {len(clear)} entries can be; ask for fewer, or train on more")
    return sorted(clear, key=hash_order)[:count]


def pack_references(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    """Entries in alphabetical order of their words, as many to a reference as ``most`` characters hold."""
    references: list[list[Entry]] = []
    room = 0
    for entry in sorted(entries, key=lambda entry: (entry.word.casefold(), entry.id)):
        if len(entry.line) + 1 > room:
            references.append([])
            room = most + 1
        references[-1].append(entry)
        room -= len(entry.line) + 1
    return references


def make_texts(entries: Sequence[Entry], options: Options) -> dict[str, list[dict[str, Any]]]:
    """The lines of each file."""
    documents = make_documents(entries, options.document_entries)
    chosen = sorted(documents, key=lambda document: hash_order(document[0], "document"))
    sizes = list(itertools.accumulate(len(document) for document in chosen))
    wanted = options.train_entries + options.heldout if options.train_entries else sizes[-1]
    trained = sum(size < wanted for size in sizes) + 1
    others = sum(size < wanted + options.other_entries for size in sizes) + 1 if options.other_entries else trained
    pool = [entry for document in chosen[:trained] for entry in document]
    heldout = choose_heldout(pool, entries, options.heldout)
    left_out = set(heldout)
    known = [entry for document in chosen[:others] for entry in document]
    references = pack_references(known, options.reference_characters)
    texts = ["\n".join(entry.line for entry in group) for group in references]
    home = {entry.id: text for group, text in zip(references, texts, strict=True) for entry in group}
    stated = [[entry for entry in document if entry not in left_out] for document in sorted(chosen[:trained])]
    said = sorted((entry for group in stated for entry in group), key=lambda entry: hash_order(entry, "prompt"))
    return {
        "train": [
            {"id": f"document {group[0].id}", "text": "\n".join(entry.sentence for entry in group)}
            for group in stated
            if group
        ],
        "references": [
            {"id": f"reference {group[0].id}", "text": text} for group, text in zip(references, texts, strict=True)
        ],
        "heldout": [
            {"id": entry.id, "context": entry.opening, "target": f" {entry.gloss}", "references": [home[entry.id]]}
            for entry in heldout
        ],
        "prompts": [
            {"id": entry.id, "prompt": entry.opening} for entry in (*heldout[:NUM_PROMPTS], *said[:NUM_PROMPTS])
        ],
    }


def run(options: Options, corpus: Path = CORPUS) -> None:
    """Write the texts; nothing is done when they are there already, made with the same options."""
    output = Path(options.output)
    inputs = {"corpus": hash_file(corpus / "entries.jsonl.gz")["sha256"]}
    settings = {name: value for name, value in asdict(options).items() if name != "output"}
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    texts = make_texts(load_entries(corpus, options.longest_gloss), options)
    counts = {f"{name} lines": len(lines) for name, lines in texts.items()}
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files={}, info=counts)
    write_texts(output, texts, manifest)
    show_counts("wordnet", counts)
    print(output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data wordnet``."""
    run(parse(Options, argv, "m3 data wordnet", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
