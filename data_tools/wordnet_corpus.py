"""Make the corpus that comes with the project, entries.jsonl.gz, from WordNet's dictionary files.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb unpacked
    python -m data_tools.wordnet_corpus --source unpacked/usr/share/wordnet --output data_tools/corpus/wordnet

Same dictionary, same bytes.
"""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m3.config import parse
from megatron_m3.errors import DataError, exit_on_user_error
from megatron_m3.manifest import atomic_path

CATEGORIES = [
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
]
FIRST_CATEGORY = 3
"""Number of the first noun category in WordNet's lexnames."""
ENTRIES, LICENCE = "entries.jsonl.gz", "LICENSE"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    source: str
    """Folder with WordNet's data.noun."""
    output: str = "data_tools/corpus/wordnet"
    """Folder to write entries.jsonl.gz and LICENSE into."""


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The noun entries of a ``data.noun`` in its order: id, words, gloss (its definition, no examples), category.

    Raises:
        DataError: a line that is not of WordNet's format (wndb(5)).
    """
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        try:
            words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            category = f"noun.{CATEGORIES[int(fields[1]) - FIRST_CATEGORY]}"
        except (IndexError, ValueError):
            raise DataError(f"{path}:{number}: not a line of WordNet's data.noun") from None
        yield {"id": fields[0], "words": words, "gloss": definition(gloss), "category": category}


def definition(gloss: str) -> str:
    """A gloss without its quoted examples."""
    return gloss.partition('; "')[0].split(' "')[0].strip(' ;:,"')


def licence(path: Path) -> str:
    """The licence at the head of a dictionary file."""
    lines = path.read_text(encoding="ascii").splitlines()
    return "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in lines if line.startswith("  ")) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the tool."""
    options = parse(Options, argv, "python -m data_tools.wordnet_corpus", __doc__ or "")
    source, output = Path(options.source) / "data.noun", Path(options.output)
    if not source.is_file():
        raise DataError(f"{source}: no such file; give the folder of WordNet's dictionary files")
    text = "".join(json.dumps(entry) + "\n" for entry in read_entries(source))
    with atomic_path(output / ENTRIES) as path:
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    with atomic_path(output / LICENCE) as path:
        path.write_text(licence(source))
    print(output)


if __name__ == "__main__":
    exit_on_user_error(main)
