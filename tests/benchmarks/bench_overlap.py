"""Speed of the leakage filter on pairs of 2048 text tokens and a reference of 128, beside rapidfuzz's LCSseq, which is
bit-parallel C++, on every window (brute force) and on the windows that a bound does not rule out.

    python -m tests.benchmarks.bench_overlap

Pairs per second of CPU time; with 2 threads, twice those per second that both used together. What two threads gain by
the clock is the last line, which says something on an idle machine. Texts are glosses of WordNet, a word a token, but
for the last rows, which are made to be hard. The second table is the worst case for each length of text, where the
reference has every token of it.
"""

import gzip
import json
import os
import re
import time
from collections.abc import Callable

import numpy as np
from rapidfuzz.distance import LCSseq

from data_tools.wordnet import CORPUS
from data_tools.wordnet_corpus import ENTRIES
from megatron_m3.retrieval.overlap import exceeds_overlap, overlaps

TEXT, REFERENCE, COUNT, LIMIT = 2048, 128, 512, 0.9


def as_text(tokens: np.ndarray) -> str:
    """Tokens as characters, the form that rapidfuzz compares fastest."""
    return (tokens + 48).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def brute_force(text: np.ndarray, reference: np.ndarray) -> float:
    """Every window of the text."""
    letters, pattern = as_text(text), as_text(reference)
    span = 2 * len(pattern)
    return max(LCSseq.similarity(letters[start : start + span], pattern)
               for start in range(max(1, len(letters) - span + 1))) / len(pattern)


def bounded_windows(text: np.ndarray, reference: np.ndarray, limit: float = 0.0) -> float:
    """Windows in which more of the reference's tokens occur, order ignored, than match in the best one so far."""
    alphabet, counts = np.unique(reference, return_counts=True)
    span, best = 2 * len(reference), int(limit * len(reference))
    places = text == alphabet[:, None]
    if np.minimum(places.sum(1), counts).sum() <= best:
        return best / len(reference)
    present = np.cumsum(np.pad(places, ((0, 0), (1, span))), axis=1, dtype=np.int16)
    bounds = np.minimum(present[:, span:] - present[:, :-span], counts[:, None]).sum(0)
    letters, pattern = as_text(text), as_text(reference)
    for start in np.argsort(-bounds, kind="stable"):
        if bounds[start] <= best:
            break
        best = max(best, LCSseq.similarity(letters[start : start + span], pattern))
    return best / len(reference)


def read_words() -> dict[str, np.ndarray]:
    """Words of all glosses of two subjects, as numbers."""
    words: dict[str, list[str]] = {"noun.animal": [], "noun.act": []}
    with gzip.open(CORPUS / ENTRIES, "rt") as lines:
        for entry in map(json.loads, lines):
            if entry["category"] in words:
                words[entry["category"]] += re.findall(r"\w+|[^\w\s]", f"{entry['words'][0]}: {entry['gloss']}.")
    numbers = np.unique([*words["noun.animal"], *words["noun.act"]], return_inverse=True)[1]
    return dict(zip(words, np.split(numbers, [len(words["noun.animal"])]), strict=True))


def cut(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """References from random places of a text."""
    places = rng.integers(0, len(words) - REFERENCE, COUNT)
    return words[places[:, None] + np.arange(REFERENCE)]


def make_pairs(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A text and references of each kind."""
    words = read_words()
    text, rest = words["noun.animal"][:TEXT], words["noun.animal"][TEXT:]
    near = cut(text, rng)
    changed = rng.random(near.shape) < rng.uniform(0, 0.2, (COUNT, 1))
    near[changed] = rng.choice(rest, changed.sum())
    draw = lambda size, *shape: rng.integers(0, size, shape)  # noqa: E731
    return {
        "copies": (text, cut(text, rng)),
        "near copies": (text, near),
        "same subject": (text, cut(rest, rng)),
        "other subject": (text, cut(words["noun.act"], rng)),
        "shuffled copies": (text, rng.permuted(cut(text, rng), axis=1)),
        "20 tokens": (draw(20, TEXT), draw(20, COUNT, REFERENCE)),
        "2 tokens": (draw(2, TEXT), draw(2, COUNT, REFERENCE)),
        "1 token": (draw(1, TEXT), draw(1, COUNT, REFERENCE)),
    }


def pairs_per_second(function: Callable[[], object], pairs: int, threads: int = 1, rounds: int = 5) -> float:
    """Best of some runs."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        function()
        best = min(best, time.process_time() - begin)
    return threads * pairs / best


def gain_of_two_threads(function: Callable[[], object]) -> float:
    """Time that one thread takes by the clock in some turns, over that of two."""
    seconds = {"1": 0.0, "2": 0.0}
    for threads in 20 * ["1", "2"]:
        os.environ["OMP_NUM_THREADS"] = threads
        begin = time.perf_counter()
        function()
        seconds[threads] += time.perf_counter() - begin
    return seconds["1"] / seconds["2"]


def compare(text: np.ndarray, references: np.ndarray) -> list[float]:
    """Pairs a second: brute force, bounded windows for values and decisions, ours on one and two threads for both."""
    lengths, few = np.full(COUNT, REFERENCE), references[:6]
    values, decisions = overlaps(text, references, lengths), exceeds_overlap(text, references, lengths, LIMIT)
    assert (decisions == (values > LIMIT)).all()
    assert values[:6].tolist() == [brute_force(text, row) for row in few] == [bounded_windows(text, row) for row in few]
    return [
        pairs_per_second(lambda: [brute_force(text, row) for row in few], len(few), rounds=2),
        pairs_per_second(lambda: [bounded_windows(text, row) for row in few], len(few), rounds=2),
        pairs_per_second(lambda: [bounded_windows(text, row, LIMIT) for row in few], len(few), rounds=2),
        *(pairs_per_second(lambda: overlaps(text, references, lengths), COUNT, threads) for threads in (1, 2)),
        *(pairs_per_second(lambda: exceeds_overlap(text, references, lengths, LIMIT), COUNT, threads)
          for threads in (1, 2)),
    ]


def worst_case(length: int, rng: np.random.Generator) -> list[float]:
    """Pairs a second where all of the text is combed: all references with one text, and each with a text of its own."""
    texts, references = rng.integers(0, 20, (COUNT, length)), rng.integers(0, 20, (COUNT, REFERENCE))
    lengths, text_of = np.full(COUNT, REFERENCE), np.arange(COUNT)
    return [pairs_per_second(work, COUNT, threads) for threads in (1, 2) for work in (
        lambda: overlaps(texts[0], references, lengths), lambda: overlaps(list(texts), references, lengths, text_of))]


def main() -> None:
    """Print both tables, and what the first use costs."""
    begin = time.process_time()
    overlaps([1], [[1]], [1])
    print(f"first use in this process: {time.process_time() - begin:.1f} s of CPU time\n")
    rng = np.random.default_rng(0)
    print(f"{'pairs/s':<16}{'rapidfuzz on':>13}{'on bounded windows':>23}{'overlaps':>22}{'exceeds_overlap':>22}")
    print(f"{'':<16}{'each window':>13}{'values':>12}{'decisions':>11}"
          + f"{'1 thread':>11}{'2 threads':>11}" * 2)
    for kind, pairs in make_pairs(rng).items():
        print(f"{kind:<16}" + "".join(f"{value:>{width},.0f}" for value, width in
                                      zip(compare(*pairs), (13, 12, 11, 11, 11, 11, 11), strict=True)))
    print(f"\n{'worst case for':<16}{'1 thread:':>11}{'':<11}{'2 threads:':>11}")
    print(f"{'texts of':<16}" + f"{'one text':>11}{'own texts':>11}" * 2)
    for length in (256, 1024, TEXT, 2 * TEXT + 64):
        print(f"{length:<16}" + "".join(f"{value:>11,.0f}" for value in worst_case(length, rng)))
    text, references = rng.integers(0, 20, TEXT), rng.integers(0, 20, (4 * COUNT, REFERENCE))
    gain = gain_of_two_threads(lambda: overlaps(text, references, np.full(4 * COUNT, REFERENCE)))
    print(f"\ntwo threads are {gain:.2f} times as fast as one by the clock")


if __name__ == "__main__":
    main()
