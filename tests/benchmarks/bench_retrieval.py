"""Retrieval on the WordNet glosses: how often a text finds the reference that holds its entry, and at what speed.

    python -m tests.benchmarks.bench_retrieval [FOLDER]

FOLDER keeps what is made of the texts (a temporary one by default). Finding an entry by chance would take place in 5
of all references.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools import embed, index, references, tokenizer, wordnet
from megatron_m3.retrieval import Retriever
from megatron_m3.tokenizer import Tokenizer

K, CHUNK, STATEMENT = 5, 64, re.compile(r"The word (.*?) means (.*)\.(?:\n|$)")


def prepare(folder: Path) -> Retriever:
    """Everything from the glosses to the index; what is there already stays."""
    texts = folder / "texts"
    wordnet.main(["--output", str(texts)])
    tokenizer.main(["--input", f"{texts}/train.jsonl,{texts}/references.jsonl", "--output", str(folder / "tokenizer")])
    references.main(["--input", str(texts / "references.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--output",
                     str(folder / "references")])
    embed.main(["--references", str(folder / "references"), "--output", str(folder / "embeddings")])
    index.main(["--references", str(folder / "references"), "--embeddings", str(folder / "embeddings"), "--output",
                str(folder / "index")])
    return Retriever.open(folder / "index", folder / "references", Tokenizer.load(folder / "tokenizer"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_queries(retriever: Retriever, texts: Path) -> dict[str, tuple[list[list[int]], list[list[set[int]]]]]:
    """Token ids of the queries of each kind, and for each query the references that hold each entry it should find."""
    home: dict[str, set[int]] = {}
    for id in range(len(retriever.references)):
        for line in retriever.references.text(id).split("\n"):
            home.setdefault(line, set()).add(id)
    encode, decode = retriever.tokenizer.encode, retriever.tokenizer.decode
    held = read_lines(texts / "heldout.jsonl")
    by_text = {retriever.references.text(id): id for id in range(len(retriever.references))}
    right = [[{by_text[line["references"][0]]}] for line in held if line["references"][0] in by_text]
    held = [line for line in held if line["references"][0] in by_text]
    queries = {
        "held-out word": ([encode(line["context"]) for line in held], right),
        "held-out gloss": ([encode(line["target"]) for line in held], right),
    }
    chunks, entries = [], []
    for document in read_lines(texts / "train.jsonl")[::16]:
        tokens = encode(document["text"])
        for start in range(0, len(tokens), CHUNK):
            said = [f"{word}: {gloss}" for word, gloss in STATEMENT.findall(decode(tokens[start : start + CHUNK]))]
            if found := [home[line] for line in said if line in home]:
                chunks.append(tokens[start : start + CHUNK])
                entries.append(found)
    return queries | {"chunk of 64 tokens": (chunks, entries)}


def share_found(ids: np.ndarray, entries: Sequence[Sequence[set[int]]]) -> float:
    """Share of the entries whose reference is among the ids [N, k] of their query."""
    rows = zip(map(set, ids.tolist()), entries, strict=True)
    return float(np.mean([bool(home & row) for row, wanted in rows for home in wanted]))


def main() -> None:
    """Print recall and queries per second for each kind of query."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        retriever = prepare(folder)
        print(f"{len(retriever.references):,} references, {retriever.embedder.size} numbers each; "
              f"by chance @{K}: {K / len(retriever.references):.4f}")
        print(f"{'query':<20}{'queries':>9}{'entries':>9}{'found@1':>9}{f'found@{K}':>9}{'queries/s':>11}"
              f"{'one by one/s':>14}")
        for name, (chunks, entries) in make_queries(retriever, folder / "texts").items():
            begin = time.perf_counter()
            ids = retriever.retrieve(chunks, K).ids
            rate = len(chunks) / (time.perf_counter() - begin)
            begin = time.perf_counter()
            for chunk in chunks[:100]:
                retriever.retrieve([chunk], K)
            single = 100 / (time.perf_counter() - begin)
            print(f"{name:<20}{len(chunks):>9,}{sum(map(len, entries)):>9,}{share_found(ids[:, :1], entries):>9.3f}"
                  f"{share_found(ids, entries):>9.3f}{rate:>11,.0f}{single:>14,.0f}")


if __name__ == "__main__":
    main()
