"""The overlap filter against brute force written from the definition (eq. 6)."""

import itertools

import numpy as np
import pytest

from megatron_m3.retrieval import overlap as package_overlap
from megatron_m3.retrieval.overlap import exceeds_overlap, overlap


def subsequence_length(text: list[int], reference: list[int]) -> int:
    """Textbook dynamic programme of the longest common subsequence."""
    row = [0] * (len(reference) + 1)
    for token in text:
        before = row
        row = [0]
        for index, other in enumerate(reference):
            row.append(before[index] + 1 if token == other else max(before[index + 1], row[index]))
    return row[-1]


def brute_force(text: list[int], reference: list[int]) -> float:
    """Every stretch of the text that spans at most twice the reference."""
    if not reference:
        return 0.0
    span = 2 * len(reference)
    return max((subsequence_length(text[start : start + span], reference) for start in range(len(text))),
               default=0) / len(reference)


def by_subsets(text: list[int], reference: list[int]) -> float:
    """The definition itself: every choice of positions in the text, its span, and whether the reference contains it."""
    best = 0
    for count in range(len(text) + 1):
        for places in itertools.combinations(range(len(text)), count):
            rest = iter(reference)
            if places and places[-1] - places[0] + 1 <= 2 * len(reference) and all(text[j] in rest for j in places):
                best = count
    return best / len(reference)


def random_pair(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """A text and a reference: independent, or copied with edits, over a vocabulary of any smallness."""
    vocabulary = int(rng.integers(1, 30))
    reference = rng.integers(0, vocabulary, rng.integers(0, 16)).tolist()
    text = rng.integers(0, vocabulary, rng.integers(0, 60)).tolist()
    if rng.random() < 0.5 and text:
        place = int(rng.integers(0, len(text)))
        copy = [token for token in reference for _ in range(int(rng.choice([0, 1, 1, 1, 2])))]
        text[place:place] = copy
    return text, reference


def test_definition_itself():
    rng = np.random.default_rng(1)
    for _ in range(60):
        text = rng.integers(0, 4, rng.integers(0, 11)).tolist()
        reference = rng.integers(0, 4, rng.integers(1, 4)).tolist()
        assert overlap(text, reference) == by_subsets(text, reference) == brute_force(text, reference)


def test_random_pairs_against_brute_force():
    rng = np.random.default_rng(2)
    for _ in range(1500):
        text, reference = random_pair(rng)
        assert overlap(text, reference) == brute_force(text, reference), (text, reference)


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.5, 2 / 3, 0.9, 1.0])
def test_decision_is_that_of_the_exact_overlap(limit):
    rng = np.random.default_rng(3)
    for _ in range(60):
        text, _ = random_pair(rng)
        pairs = [random_pair(rng)[1] for _ in range(4)] + [text[3:11], text[::2][:12]]
        lengths = np.array([len(reference) for reference in pairs])
        references = np.full((len(pairs), 18), 7)  # padding is a real token: it must not be read
        for row, reference in enumerate(pairs):
            references[row, : len(reference)] = reference
        expected = [brute_force(text, reference) > limit for reference in pairs]
        assert exceeds_overlap(np.array(text, int), references, lengths, limit).tolist() == expected


def test_span_limit_counts_both_ends():
    reference = [1, 2]
    assert overlap([1, 0, 0, 2], reference) == 1.0
    assert overlap([1, 0, 0, 0, 2], reference) == 0.5


def test_long_text_does_not_inflate():
    reference = list(range(8))
    scattered = [token for value in reference for token in [value, *[99] * 20]]
    assert overlap(scattered, reference) == brute_force(scattered, reference) == 1 / 8


@pytest.mark.parametrize(("text", "reference", "expected"), [
    ([], [], 0.0), ([1], [], 0.0), ([], [1], 0.0), ([1], [1], 1.0), ([2], [1], 0.0), ([1], [1, 2, 3, 4], 0.25),
    ([3, 2, 1], [1, 2, 3], 1 / 3), ([5, 5, 5, 5], [5, 5], 1.0),
])
def test_small_and_empty(text, reference, expected):
    assert overlap(text, reference) == expected


def test_large_sizes_and_token_ids():
    rng = np.random.default_rng(4)
    text = rng.integers(0, 2**31 - 1, 3000)
    reference = text[1000:1300]
    assert overlap(text, reference) == 1.0
    assert overlap(np.delete(text, np.s_[1000:1030]), reference) == 0.9
    padded = np.zeros((3, 300), np.int32)
    padded[0], padded[2, :1] = reference, text[0]
    assert exceeds_overlap(text, padded, np.array([300, 0, 1]), 0.9).tolist() == [True, False, True]
    assert exceeds_overlap(text, padded[:0], np.zeros(0, int), 0.9).shape == (0,)


def test_package_exports_the_function():
    assert package_overlap is overlap
