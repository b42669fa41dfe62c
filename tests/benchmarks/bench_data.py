"""Documents a second per core of each step from raw files to a vocabulary, beside the same work by a bare library.

    python -m tests.benchmarks.bench_data

Times are of the CPU, of each step's kernel in this process, on the same documents as the library's: WordNet's texts,
short and long, some of them repeated wholly or nearly. Whole jobs, and how they grow: bench_data_growth.
"""

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_tools.collect import DocumentFolder, make_plan, write_block
from data_tools.deduplicate import Deduplication
from data_tools.deduplicate import Options as DeduplicateOptions
from data_tools.document_store import DocumentStore
from data_tools.filter import Options as FilterOptions
from data_tools.filter import judge
from data_tools.wordnet import CORPUS, load_entries
from data_tools.words import split_words
from megatron_m3.tokenizer import Tokenizer, extend_tokenizer, train_tokenizer

SAMPLE = 2000
ENTRIES = (7, 25)
"""Entries in a document: some 100 and 400 words."""
HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说"


def make_texts(count: int, size: int) -> list[str]:
    """Texts of ``size`` WordNet entries; a tenth repeat an earlier one wholly, a tenth but for a word."""
    rng, texts = random.Random(0), []
    entries = [f"{entry.opening} {entry.gloss}." for entry in load_entries(CORPUS, 160)]
    for number in range(count):
        kind = rng.random()
        if texts and kind < 0.2:
            text = rng.choice(texts)
            texts.append(text if kind < 0.1 else text.replace(" the ", f" n{number} ", 1))
        else:
            texts.append(" ".join(rng.choices(entries, k=size)))
    return texts


def per_second(count: int, work: Callable[[], object], rounds: int = 3) -> float:
    """Documents a second of the CPU, the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return count / best


def show(step: str, ours: float, library: str, theirs: float) -> None:
    """A row of the table."""
    print(f"{step:<22}{ours:>12,.0f}{theirs:>12,.0f}{ours / theirs:>9.2f}  {library}", flush=True)


def compare_collect(texts: Sequence[str], folder: Path) -> None:
    """JSON lines to parquet."""
    import pyarrow
    from pyarrow import parquet

    path = folder / "raw.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{number}", "text": text}) + "\n" for number, text in enumerate(texts)))

    def bare() -> None:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        hashlib.sha256(path.read_bytes()).hexdigest()
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bare.parquet", compression="zstd",
                            compression_level=3)

    plan = list(make_plan([path], 64 << 20))
    out = DocumentFolder(folder / "collected", {"kind": "documents"})
    ours = per_second(len(texts), lambda: write_block(out, plan, 0))
    out.finish(1, {}, {})
    show("collect", ours, "json and pyarrow", per_second(len(texts), bare))


def compare_filter(texts: list[str]) -> None:
    """Rules alone, and rules and language."""
    import fasttext

    from data_tools.languages import model_path

    model = fasttext.load_model(str(model_path()))
    options = FilterOptions(input="", output="")
    rules = FilterOptions(input="", output="", languages=())
    show("filter, rules alone", per_second(len(texts), lambda: list(judge(texts, rules))), "str.split and a Counter",
         per_second(len(texts), lambda: [plain_rules(text) for text in texts]))
    show("filter", per_second(len(texts), lambda: list(judge(texts, options))), "the same, and fastText",
         per_second(len(texts), lambda: [model.predict(text[:1000].replace("\n", " ")) for text in texts
                                         if plain_rules(text)]))


def plain_rules(text: str) -> bool:
    """The rules as one would write them with Python's own strings."""
    from collections import Counter
    from math import log

    words = "".join(one if one.isalnum() else " " for one in text.lower()).split()
    counts = Counter(words)
    entropy = log(len(words)) - sum(count * log(count) for count in counts.values()) / len(words)
    letters = sum(map(str.isalpha, text)) / len(text)
    return (len(words) >= 50 and sum(map(len, words)) / len(words) <= 10 and letters >= 0.3
            and len(counts) / len(words) <= 0.95 and entropy >= 2.5)


def compare_deduplicate(texts: Sequence[str], folder: Path) -> None:
    """All stages on one block, beside datasketch's signatures and its index."""
    import datasketch

    store = DocumentStore.open(folder / "collected")
    options = DeduplicateOptions(input="", output="")
    work = Deduplication(store, DocumentFolder(folder / "unique", {}), {}, options)
    minhash = options.minhash

    def ours() -> None:
        for stage in ("hash", "exact", "sign", "near", "group"):
            getattr(work, stage)(0)
        work.write(0)

    def shingles(text: str) -> list[bytes]:
        words = text.lower().split()
        return [" ".join(words[first : first + minhash.shingle]).encode() for first in range(len(words) - 4)]

    def signatures() -> list["datasketch.MinHash"]:
        found = []
        for text in texts:
            found.append(datasketch.MinHash(minhash.num_perm))
            found[-1].update_batch(shingles(text))
        return found

    def theirs() -> None:
        index = datasketch.MinHashLSH(num_perm=minhash.num_perm, params=(minhash.bands, minhash.rows))
        for number, signature in enumerate(signatures()):
            index.query(signature)
            index.insert(str(number), signature)

    show("deduplicate, signing", per_second(len(texts), lambda: list(map(minhash.sign, split_words(texts)))),
         "datasketch MinHash", per_second(len(texts), signatures, 1))
    show("deduplicate, all", per_second(len(texts), ours), "datasketch MinHash, LSH", per_second(len(texts), theirs, 1))


def compare_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """A vocabulary of a second language, beside one trained from nothing."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    base = train_tokenizer(texts, 2000, folder / "base")
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, len(HAN) + 1)
    second = ["，".join("".join(rng.choice(list(HAN), 12, p=weights / weights.sum())) for _ in range(40))
              for _ in range(len(texts))]
    made: list[Tokenizer] = []

    def bare() -> None:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.train_from_iterator(second, trainers.BpeTrainer(vocab_size=2256, show_progress=False))

    ours = per_second(len(second), lambda: made.append(extend_tokenizer(base, second, 4000, folder / f"t{len(made)}")))
    show("tokenizer --extend", ours, "tokenizers' trainer", per_second(len(second), bare))


def main() -> None:
    """Print the table."""
    print("documents a second of one core")
    for entries in ENTRIES:
        texts = make_texts(SAMPLE, entries)
        words = sum(len(text.split()) for text in texts) / len(texts)
        print(f"{f'{words:.0f} words each':<22}{'ours':>12}{'library':>12}{'ratio':>9}  library")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            compare_collect(texts, folder)
            compare_filter(texts)
            compare_deduplicate(texts, folder)
            compare_tokenizer(texts, folder)


if __name__ == "__main__":
    main()
