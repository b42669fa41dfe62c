"""m3 data neighbours: the references that each 64-token chunk of the corpus retrieves with its own text.

Dropped are references that overlap with the document (eq. 6, the leakage filter) and pieces of the very document, by
its id; the next nearest take their places. What is still missing is marked so. Start the same command as often as
wanted, anywhere: the jobs share the blocks, and a killed one is not missed.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_tools.shared_work import Workers, take_gpu
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import BlockFolder, Manifest, atomic_path, is_finished, write_manifest
from megatron_m3.platform.threads import one_faiss_thread

if TYPE_CHECKING:
    import numpy as np

    from megatron_m3.data import TokenStore
    from megatron_m3.retrieval import Retriever

BATCH = 512
"""Chunks searched at once."""
MAX_NEIGHBOURS = 4096
"""Most --neighbours: every chunk has room for so many."""
REACH = 2048
"""Tokens before and after a chunk that a reference must not overlap with."""
COUNTS = ("chunks", "searched", "found", "missing", "dropped by filter", "dropped same document")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    tokens: str
    """Folder of the tokenized corpus, made by `m3 data tokenize`."""
    tokenizer: str
    """Folder of its tokenizer, made by `m3 data tokenizer`."""
    references: str
    """Folder of the references, made by `m3 data references`."""
    index: str
    """Folder of their index, made by `m3 data index`."""
    output: str
    """Folder to write."""
    neighbours: int = 4
    """References for each chunk; training reads the first that passes its own filter."""
    max_overlap: float = 0.9
    """References that overlap more with the document (2048 tokens around the chunk) are dropped."""
    chunk_length: int = 64
    """Tokens in a chunk; memory.chunk_length of the training to come."""
    documents_per_block: int = 512
    """Documents in a block file."""
    workers: int = 1
    """Processes here, of one thread each, on the GPUs in turn; more jobs of the same command, on any machine, share the
    blocks too."""

    def __post_init__(self) -> None:
        for name in ("neighbours", "chunk_length", "documents_per_block", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.neighbours > MAX_NEIGHBOURS:
            raise ConfigError(f"neighbours={self.neighbours}: must be at most {MAX_NEIGHBOURS:,}")
        if not 0 <= self.max_overlap <= 1:
            raise ConfigError(f"max_overlap={self.max_overlap}: must be between 0 and 1")


class Verdict(NamedTuple):
    """Why candidates are dropped, bool [M] each."""

    same_document: "np.ndarray"
    leaks: "np.ndarray"


class Corpus:
    """The chunks of a tokenized corpus, and which references they may have."""

    def __init__(self, tokens: "TokenStore", retriever: "Retriever", chunk_length: int, max_overlap: float) -> None:
        self.tokens, self.retriever = tokens, retriever
        self.chunk_length, self.max_overlap = chunk_length, max_overlap
        self.document_ids = tokens.document_ids()

    def num_chunks(self, document: int) -> int:
        """Chunks of a document, the last maybe short."""
        return -(-int(self.tokens.lengths[document]) // self.chunk_length)

    def read(self, document: int, chunk: int, reach: int = 0) -> "np.ndarray":
        """Tokens of a chunk and of ``reach`` tokens before and after it, as far as the document goes."""
        import numpy as np

        first = max(0, chunk * self.chunk_length - reach)
        last = min(int(self.tokens.lengths[document]), (chunk + 1) * self.chunk_length + reach)
        return np.array(self.tokens.read(document, first, last - first))  # a copy outlives the mapped file

    def judge(self, places: Sequence[tuple[int, int]], rows: "np.ndarray", ids: "np.ndarray") -> Verdict:
        """Which of the references ``ids`` [M] are from the document of their chunk, or overlap with it too much.

        ``places``: document and number of chunks; ``rows``: which of them each reference is for, ascending, [M].
        """
        import numpy as np

        from megatron_m3.retrieval import exceeds_overlap

        references = self.retriever.references
        distinct, which = np.unique(ids, return_inverse=True)
        documents = np.array([references.source(int(id))[0] for id in distinct], object)
        own = np.array([self.document_ids[document] for document, _ in places], object)
        leaks = exceeds_overlap(self.around(places), *references.tokens(ids), self.max_overlap, rows)
        return Verdict((documents[which] == own[rows]).astype(bool), leaks)

    def overlaps(self, places: Sequence[tuple[int, int]], rows: "np.ndarray", ids: "np.ndarray") -> "np.ndarray":
        """Overlap of each reference with the text around its chunk, float64 [M]; arguments as :meth:`judge` has."""
        from megatron_m3.retrieval import overlaps

        return overlaps(self.around(places), *self.retriever.references.tokens(ids), rows)

    def around(self, places: Sequence[tuple[int, int]]) -> list["np.ndarray"]:
        """The text around each chunk that its references must not overlap with."""
        return [self.read(document, chunk, REACH) for document, chunk in places]


def open_corpus(options: Options) -> Corpus:
    """Open everything that ``options`` name.

    Raises:
        ArtifactError: something is damaged, or was not made for the others.
    """
    from megatron_m3.platform import select

    select()  # before anything of megatron.core is imported
    from megatron_m3.data import TokenStore
    from megatron_m3.retrieval import Retriever
    from megatron_m3.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer)
    tokens = TokenStore.open(options.tokens, tokenizer_hash=tokenizer.hash)
    retriever = Retriever.open(options.index, options.references, tokenizer)
    return Corpus(tokens, retriever, options.chunk_length, options.max_overlap)


def run(options: Options) -> None:
    """Write the blocks that are missing, then counts and manifest."""
    from data_tools.documents import show_counts
    from megatron_m3.data.neighbours import KIND, SCHEMA

    corpus, output = open_corpus(options), Path(options.output)
    tokens, retriever = corpus.tokens, corpus.retriever
    inputs = {"tokens": tokens.hash, "references": retriever.references.hash, "tokenizer": retriever.tokenizer.hash,
              "index": retriever.index.hash}
    names = ("neighbours", "max_overlap", "chunk_length", "documents_per_block")
    settings = {name: asdict(options)[name] for name in names}
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    folder = BlockFolder(output, {"kind": KIND, "schema": SCHEMA, "inputs": inputs, "settings": settings})
    size = options.documents_per_block
    sizes = [min(size, len(tokens) - first) for first in range(0, len(tokens), size)]
    with Workers(options.workers) as workers:
        workers.run("neighbours", folder, sizes, "documents", Search(options, folder, corpus))
    num_blocks = len(sizes)
    totals = {name: sum(info[name] for info in folder.info(num_blocks)) for name in COUNTS}
    with atomic_path(output / "counts.json") as path:
        path.write_text(json.dumps(totals, indent=1) + "\n")
    files = folder.files(num_blocks)
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files, info=totals)
    write_manifest(output, manifest)
    show_counts("neighbours", totals)
    print(output)


class Search:
    """Writes blocks of neighbours; a process that gets it opens the corpus itself."""

    def __init__(self, options: Options, folder: BlockFolder, corpus: Corpus | None) -> None:
        self.options, self.folder, self.corpus = options, folder, corpus

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"corpus": None}

    def __call__(self, index: int) -> None:
        """Write the block ``index``, by one thread: with several the last bits of scores may differ."""
        if self.corpus is None:
            take_gpu()
            self.corpus = open_corpus(self.options)
        size = self.options.documents_per_block
        documents = range(index * size, min(len(self.corpus.tokens), (index + 1) * size))
        with one_faiss_thread():
            self.folder.write(index, *find_neighbours(self.corpus, documents, self.options.neighbours))


def find_neighbours(corpus: Corpus, documents: range, k: int) -> tuple[dict[str, "np.ndarray"], dict[str, int]]:
    """The arrays of a block (see ``megatron_m3/data/neighbours.py``) for ``documents``, and its counts."""
    import numpy as np

    offsets = np.cumsum([0, *map(corpus.num_chunks, documents)], dtype=np.int64)
    parts, counts = [], Counter(dict.fromkeys(COUNTS, 0))
    for places in batched(chunk_places(corpus, documents), BATCH):
        parts.append(find_batch(corpus, places, k, counts))
    names = ("ids", "valid", "scores", "overlaps")
    arrays = {name: np.concatenate(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
    return {"chunk_offsets": offsets} | arrays, dict(counts)


def chunk_places(corpus: Corpus, documents: range) -> Iterator[tuple[int, int]]:
    """Document and number of every chunk."""
    for document in documents:
        for chunk in range(corpus.num_chunks(document)):
            yield document, chunk


def find_batch(
    corpus: Corpus, places: Sequence[tuple[int, int]], k: int, counts: Counter[str]
) -> tuple["np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray"]:
    """Ids, validity, scores and overlaps, [chunks, k] each, of the chunks at ``places``; adds to ``counts``."""
    import numpy as np

    dropped = np.zeros((len(places), 2), np.int64)

    def drop(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        asked, first, which = np.unique(rows, return_index=True, return_inverse=True)
        same, leaks = corpus.judge([places[row] for row in asked], which, ids)
        keep = ~(same | leaks)
        kept_before = np.cumsum(keep) - keep
        seen = kept_before - kept_before[first][which] < k
        for column, why in enumerate((same, leaks & ~same)):
            dropped[asked, column] = np.bincount(which[seen & why], minlength=len(asked))
        return ~keep

    vectors = corpus.retriever.embed([corpus.read(*place).tolist() for place in places])
    scores, ids, valid = corpus.retriever.index.search_filtered(vectors, k, drop)
    overlaps = np.zeros((len(places), k), np.float32)
    overlaps[valid] = corpus.overlaps(places, np.nonzero(valid)[0], ids[valid])
    counts.update({
        "chunks": len(places), "searched": int(vectors.any(axis=1).sum()), "found": int(valid.sum()),
        "missing": int((~valid).sum()), "dropped same document": int(dropped[:, 0].sum()),
        "dropped by filter": int(dropped[:, 1].sum()),
    })
    return ids, valid, scores, overlaps


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data neighbours``."""
    run(parse(Options, argv, "m3 data neighbours", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
