"""Speed of the leakage filter on pairs of 2048 text tokens and a reference of 128, beside brute force.

    python -m tests.benchmarks.bench_overlap
"""

import time
from collections.abc import Callable

import numpy as np
from rapidfuzz.distance import LCSseq

from megatron_m3.retrieval.overlap import exceeds_overlap, overlap

TEXT, REFERENCE, VOCABULARY, LIMIT = 2048, 128, 8192, 0.9


def brute_force(text: np.ndarray, reference: np.ndarray) -> float:
    """Every window of the text, each by rapidfuzz: a fast kernel under a plain loop."""
    tokens, pattern = text.tolist(), reference.tolist()
    span = 2 * len(pattern)
    windows = (tokens[start : start + span] for start in range(len(tokens) - span + 1))
    return max(LCSseq.similarity(window, pattern) for window in windows) / len(pattern)


def make_pairs(kind: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A text with word frequencies by Zipf's law, and references: of their own, or copied from it with edits."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    draw = lambda *shape: rng.choice(VOCABULARY, shape, p=weights / weights.sum())  # noqa: E731
    text, references = draw(TEXT), draw(count, REFERENCE)
    if kind == "leak-like":
        for row in references:
            place = rng.integers(0, TEXT - REFERENCE)
            kept = rng.random(REFERENCE) > rng.uniform(0, 0.2)
            row[kept] = text[place : place + REFERENCE][kept]
    return text, references


def pairs_per_second(function: Callable[[], object], pairs: int) -> float:
    """Best of three runs."""
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return pairs / best


def main() -> None:
    """Print pairs per second, and the ratio to brute force."""
    rng = np.random.default_rng(0)
    print(f"{'pairs':<12}{'brute force/s':>15}{'overlap/s':>15}{'ratio':>9}{'exceeds/s':>15}{'ratio':>9}"
          f"{'over limit':>12}")
    for kind in ("text-like", "leak-like"):
        text, references = make_pairs(kind, 256, rng)
        lengths = np.full(len(references), REFERENCE)
        exact = [overlap(text, row) for row in references]
        decision = exceeds_overlap(text, references, lengths, LIMIT)
        assert decision.tolist() == [value > LIMIT for value in exact]
        assert exact[:16] == [brute_force(text, row) for row in references[:16]]
        floor = pairs_per_second(lambda t=text, r=references: [brute_force(t, row) for row in r[:8]], 8)
        value = pairs_per_second(lambda t=text, r=references: [overlap(t, row) for row in r], len(references))
        fast = pairs_per_second(lambda t=text, r=references, n=lengths: exceeds_overlap(t, r, n, LIMIT), len(lengths))
        print(f"{kind:<12}{floor:>15,.0f}{value:>15,.0f}{value / floor:>9.1f}{fast:>15,.0f}{fast / floor:>9.0f}"
              f"{decision.mean():>12.0%}")


if __name__ == "__main__":
    main()
