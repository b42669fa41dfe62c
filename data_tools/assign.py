"""m3 data assign: each chunk's reference as the documents themselves name it, instead of retrieving it.

A document {"id", "text", "references": [...]} names for its chunks, in order, the document of the knowledge base that
is their reference, or null. What `m3 data neighbours` makes by searching has the same form.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.documents import find_files, show_counts
from megatron_m3.config import parse
from megatron_m3.errors import ArtifactError, ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import BlockFolder, Manifest, check_input, hash_file, hash_json, is_finished, write_manifest

if TYPE_CHECKING:
    import numpy as np

    from megatron_m3.data import TokenStore
    from megatron_m3.references import ReferenceStore


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: tuple[str, ...]
    """The JSONL files that `tokens` was made from, in the same order, separated by commas."""
    tokens: str
    """Folder of the tokenized corpus, made by `m3 data tokenize`."""
    references: str
    """Folder of the references, made by `m3 data references`."""
    output: str
    """Folder to write."""
    chunk_length: int = 64
    """Tokens in a chunk; memory.chunk_length of the training to come."""
    documents_per_block: int = 4096
    """Documents in a block file."""

    def __post_init__(self) -> None:
        for name in ("chunk_length", "documents_per_block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


type Named = dict[str, list[str | None]]
"""The references that each document names, by the document's id."""


def read_named(files: Sequence[Path]) -> Named:
    """What the documents of JSONL files name; nothing for those without ``references``.

    Raises:
        DataError: names the file and the line that is not such a document.
    """
    named: Named = {}
    for path in files:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    record: Any = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
                    document, references = record["id"], record.get("references", [])
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    document = None
                if document in (None, ""):
                    raise DataError(f"{path}, line {number}: not a JSON object with an id") from None
                if not isinstance(references, list) or not all(isinstance(one, str | None) for one in references):
                    raise DataError(f"{path}, line {number}: references is not a list of ids or null")
                if str(document) in named:
                    raise DataError(f"{path}, line {number}: a second document has the id {document}")
                named[str(document)] = references
    return named


def reference_ids(references: "ReferenceStore") -> dict[str, int]:
    """The reference that each document of the knowledge base became.

    Raises:
        ArtifactError: one became several, so that its name says too little.
    """
    found: dict[str, int] = {}
    for number in range(len(references)):
        name, first_token = references.source(number)
        if name in found and not first_token:
            raise ArtifactError(f"{references.folder}: two documents are called {name}; give each an id of its own and "
                                "make the references again")
        if name in found:
            raise ArtifactError(
                f"{references.folder}: document {name} is cut into several references; shorten it, "
                "or make the references with a larger reference_length"
            )
        found[name] = number
    return found


class Placing:
    """Puts the references that documents name at their chunks."""

    def __init__(self, named: Named, tokens: "TokenStore", references: "ReferenceStore", chunk_length: int) -> None:
        self.named, self.tokens, self.references, self.chunk_length = named, tokens, references, chunk_length
        self.document_ids, self._numbers = tokens.document_ids(), reference_ids(references)

    def block(self, documents: range) -> tuple[dict[str, "np.ndarray"], dict[str, int]]:
        """The arrays of a block (see ``megatron_m3/data/neighbours.py``), and its counts.

        Raises:
            DataError: a document names more references than it has chunks, or one that is not there.
        """
        import numpy as np

        from megatron_m3.retrieval import overlap

        chunks = [-(-int(self.tokens.lengths[document]) // self.chunk_length) for document in documents]
        offsets = np.cumsum([0, *chunks], dtype=np.int64)
        ids, overlaps = np.zeros((int(offsets[-1]), 1), np.int64), np.zeros((int(offsets[-1]), 1), np.float32)
        valid = np.zeros(ids.shape, bool)
        for document, first, num_chunks in zip(documents, offsets, chunks, strict=False):
            own_id = self.document_ids[document]
            names = self.named[own_id]
            if len(names) > num_chunks:
                raise DataError(f"document {own_id}: {len(names)} references for {num_chunks} chunks")
            text = self.tokens.document(document)
            for row, name in enumerate(names, int(first)):
                if name is not None:
                    ids[row], valid[row] = self._number(name, own_id), True
                    tokens, lengths = self.references.tokens(ids[row])
                    overlaps[row] = overlap(text, tokens[0, : lengths[0]])
        found = int(valid.sum())
        arrays = {"ids": ids, "valid": valid, "scores": valid.astype(np.float32), "overlaps": overlaps}
        return {"chunk_offsets": offsets} | arrays, {"chunks": len(ids), "given": found, "without": len(ids) - found}

    def _number(self, name: str, document: str) -> int:
        if name not in self._numbers:
            raise DataError(f"document {document}: names the reference {name}, which {self.references.folder} lacks")
        return self._numbers[name]


def open_placing(options: Options) -> Placing:
    """Open everything that ``options`` name, and check that it belongs together.

    Raises:
        ArtifactError: something is damaged, or the tokens are not those of the input, or of another tokenizer.
    """
    from megatron_m3.data import TokenStore
    from megatron_m3.references import ReferenceStore

    tokens = TokenStore.open(options.tokens)
    references = ReferenceStore.open(options.references, tokenizer_hash=tokens.tokenizer_hash)
    files = find_files(options.input)
    for path in files:
        if path.suffix not in (".jsonl", ".json"):
            raise DataError(f"{path}: documents that name their references are JSONL; give such a file")
    check_input(tokens.folder, tokens.manifest, "corpus", hash_json([hash_file(path)["sha256"] for path in files]))
    return Placing(read_named(files), tokens, references, options.chunk_length)


def run(options: Options) -> None:
    """Write the blocks that are missing, then the manifest."""
    from megatron_m3.data.neighbours import KIND, SCHEMA
    from megatron_m3.platform.progress import Progress

    placing, output = open_placing(options), Path(options.output)
    tokens, size = placing.tokens, options.documents_per_block
    inputs = {"tokens": tokens.hash, "references": placing.references.hash, "tokenizer": tokens.tokenizer_hash}
    settings = {"neighbours": 1, "given": True, "chunk_length": options.chunk_length, "documents_per_block": size}
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    folder = BlockFolder(output, {"kind": KIND, "schema": SCHEMA, "inputs": inputs, "settings": settings})
    num_blocks = -(-len(tokens) // size)
    with Progress("neighbours", len(tokens), "documents") as progress:
        for index in range(num_blocks):
            documents = range(index * size, min(len(tokens), (index + 1) * size))
            if not folder.done(index):
                folder.write(index, *placing.block(documents))
            progress.advance(len(documents))
    totals = dict(sum((Counter(info) for info in folder.info(num_blocks)), Counter()))
    files = folder.files(num_blocks)
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files, info=totals)
    write_manifest(output, manifest)
    show_counts("neighbours", totals)
    print(output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data assign``."""
    run(parse(Options, argv, "m3 data assign", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
