"""Index and neighbours, per core, beside the same work by bare FAISS and the overlap filter alone.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_index [VECTORS]

Times are of the CPU. Vectors are random, around 1,000 centres; the neighbours are of documents of WordNet entries.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import faiss
import numpy as np

from data_tools import embed, neighbours, references, tokenize
from data_tools import index as indexing
from data_tools.embeddings import Embeddings
from data_tools.faiss_build import make_faiss, num_lists, sample_size
from megatron_m3.manifest import BlockFolder, Manifest, write_manifest
from megatron_m3.retrieval import VectorIndex, exceeds_overlap, overlap
from megatron_m3.retrieval.tfidf import train_tfidf
from megatron_m3.tokenizer import train_tokenizer
from tests.benchmarks.bench_data import ENTRIES, make_texts, per_second, show

SIZE, BLOCK, QUERIES, K = 256, 16384, 2048, 4
INPUTS = {"references": "0" * 64}


def make_embeddings(count: int, folder: Path) -> Embeddings:
    """Vectors of length 1 in blocks, as `m3 data embed` writes them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, SIZE), np.float32)
    blocks = BlockFolder(folder, {"kind": "benchmark"})
    starts = range(0, count, BLOCK)
    for number, first in enumerate(starts):
        length = min(BLOCK, count - first)
        vectors = centres[rng.integers(1000, size=length)] + rng.standard_normal((length, SIZE), np.float32)
        blocks.write(number, {"vectors": vectors / np.linalg.norm(vectors, axis=1, keepdims=True)})
    train_tfidf(["some words"], folder / "embedder", size=SIZE, complete=True)
    write_manifest(folder, Manifest(kind="embeddings", schema=1, inputs=INPUTS, settings={},
                                    files=blocks.files(len(starts)), info={"size": SIZE, "references": count}))
    return Embeddings(folder, INPUTS["references"])


def compare_index(embeddings: Embeddings, factory: str, folder: Path) -> None:
    """Training, adding, writing and measuring the recall, and searching."""
    count = embeddings.count
    queries = embeddings.sample(QUERIES)
    made: list[Path] = []

    def ours() -> None:
        made.append(folder / f"{factory}_{len(made)}")
        options = indexing.Options(references="", embeddings="", output=str(made[-1]), factory=factory)
        indexing.build(options, {"factory": factory}, INPUTS, embeddings)

    def bare() -> None:
        index = make_faiss(factory, SIZE, count)
        if not index.is_trained:
            index.train(embeddings.sample(sample_size(index)))
        for block in embeddings.blocks():
            index.add(np.array(block))
        faiss.write_index(index, str(folder / "bare.faiss"))
        measured = embeddings.sample(512)
        for block in embeddings.blocks():
            faiss.knn(measured, np.array(block), 6, faiss.METRIC_INNER_PRODUCT)
        index.search(measured, 6)

    show(f"index, {factory}", per_second(count, ours, 2), "FAISS, with exact search", per_second(count, bare, 2))
    manifest = Manifest(kind="index", schema=1, inputs={}, settings={}, files={})
    opened = VectorIndex(made[-1], manifest, faiss.read_index(str(made[-1] / "index.faiss"), faiss.IO_FLAG_MMAP_IFC))
    plain = faiss.read_index(str(made[-1] / "index.faiss"))
    show("  search", per_second(QUERIES, lambda: opened.search(queries, 5)), "FAISS search",
         per_second(QUERIES, lambda: plain.search(queries, 5)))


def make_corpus(folder: Path) -> neighbours.Corpus:
    """Tokens, references and index of documents of WordNet entries."""
    texts = make_texts(1500, ENTRIES[1])
    for name, part in (("train", texts[:150]), ("knowledge", texts[150:])):
        lines = [json.dumps({"id": f"{name}{number}", "text": text}) + "\n" for number, text in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    train_tokenizer(texts, 4000, folder / "tokenizer")
    at: Callable[..., list[str]] = lambda *names: [word for name in names  # noqa: E731
                                                   for word in (f"--{name}", str(folder / name))]
    tokenize.main(["--input", str(folder / "train.jsonl"), *at("tokenizer"), "--output", str(folder / "tokens")])
    references.main(["--input", str(folder / "knowledge.jsonl"), *at("tokenizer"), "--output",
                     str(folder / "references")])
    embed.main([*at("references"), "--output", str(folder / "embeddings")])
    indexing.main([*at("references", "embeddings"), "--output", str(folder / "index")])
    given = {name: str(folder / name) for name in ("tokens", "tokenizer", "references", "index")}
    return neighbours.open_corpus(neighbours.Options(**given, output=""))


def compare_neighbours(corpus: neighbours.Corpus) -> None:
    """Searching and filtering every chunk, beside the library's calls in a loop."""
    documents = range(len(corpus.tokens))
    places = list(neighbours.chunk_places(corpus, documents))
    index, store = corpus.retriever.index.faiss_index, corpus.retriever.references
    source = cache(lambda id: store.source(id)[0])

    def bare() -> None:
        vectors = corpus.retriever.embed([corpus.read(*place).tolist() for place in places])
        found = index.search(vectors, 2 * K + 4)[1]
        for (document, chunk), ids in zip(places, found, strict=True):
            around = corpus.read(document, chunk, neighbours.REACH)
            leaks = exceeds_overlap(around, *store.tokens(ids), corpus.max_overlap)
            same = [source(int(id)) == corpus.document_ids[document] for id in ids]
            rows, lengths = store.tokens(ids[~(leaks | same)][:K])
            [overlap(around, row[:length]) for row, length in zip(rows, lengths, strict=True)]

    show("neighbours, chunks", per_second(len(places), lambda: neighbours.find_neighbours(corpus, documents, K), 2),
         "FAISS search and filter", per_second(len(places), bare, 2))


def main() -> None:
    """Print the rows."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30_000
    faiss.omp_set_num_threads(1)
    print(f"{count:,} vectors of {SIZE} numbers, a second of one core")
    print(f"{'step':<22}{'ours':>12}{'library':>12}{'ratio':>9}  library")
    with tempfile.TemporaryDirectory() as name:
        with contextlib.redirect_stdout(sys.stderr):
            corpus = make_corpus(Path(name))
        compare_neighbours(corpus)
        embeddings = make_embeddings(count, Path(name) / "vectors")
        for factory in ("Flat", f"IVF{num_lists(count)},Flat", f"IVF{num_lists(count)},PQ64x4"):
            compare_index(embeddings, factory, Path(name))


if __name__ == "__main__":
    main()
