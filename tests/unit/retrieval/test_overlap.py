"""The overlap filter against brute force written from the definition (eq. 6)."""

import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from rapidfuzz.distance import LCSseq

from megatron_m3.retrieval import overlap as package_overlap
from megatron_m3.retrieval.overlap import PAIRS_PER_THREAD, exceeds_overlap, overlap, overlaps


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


def every_window(text: np.ndarray, reference: np.ndarray) -> float:
    """:func:`brute_force`, each window by a library."""
    span, windows = 2 * len(reference), range(max(1, len(text) - 2 * len(reference) + 1))
    letters, pattern = ("".join(map(chr, tokens + 48)) for tokens in (text, reference))
    return max(LCSseq.similarity(letters[start : start + span], pattern) for start in windows) / max(1, len(reference))


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


LENGTHS = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129]


@pytest.mark.parametrize("alphabet", [1, 2, 5, 40, 400])
def test_lengths_about_the_widths_of_words_and_vectors(alphabet):
    rng = np.random.default_rng(alphabet)
    for size in (0, 1, 30, 127, 128, 255, 256, 257, 700):
        text = rng.integers(0, alphabet, size)
        references = rng.integers(0, alphabet, (len(LENGTHS), max(LENGTHS)))
        for row, length in zip(references[::2], LENGTHS[::2], strict=True):  # half of them nearly copies
            place = int(rng.integers(0, max(1, size - length)))
            copy = text[place : place + length]
            row[: len(copy)] = np.where(rng.random(len(copy)) < 0.9, copy, row[: len(copy)])
        expected = [every_window(text, row[:length]) for row, length in zip(references, LENGTHS, strict=True)]
        assert overlaps(text, references, LENGTHS).tolist() == expected
        for limit in (0.5, 0.9):
            decision = exceeds_overlap(text, references, LENGTHS, limit)
            assert decision.tolist() == [value > limit for value in expected]


@pytest.mark.parametrize("alphabet", [2, 30, 3000])
def test_long_texts(alphabet):
    rng = np.random.default_rng(alphabet)
    text = rng.integers(0, alphabet, 9000)
    references = np.stack([text[place : place + 100] for place in range(3900, 4400, 50)])
    references[:, ::7] = rng.integers(0, alphabet, references[:, ::7].shape)
    expected = [every_window(text, row) for row in references]
    assert overlaps(text, references, [100] * len(references)).tolist() == expected


def test_one_window_of_all():
    reference = np.arange(100)
    spread = np.full(200, 50)  # holds the reference in exactly one window
    spread[:198:2], spread[199] = reference[:99], 99
    for place in range(3890, 3906):
        text = np.full(5000, 50)
        text[place - 4 : place], text[place : place + 200] = 1000, spread
        assert overlap(text, reference) == 1.0
        assert overlap(np.insert(text, place + 100, 50), reference) == 0.99


def test_each_reference_with_the_text_that_is_named_for_it(monkeypatch):
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, 20, size).tolist() for size in (50, 0, 7, 0, 90)]
    count = 2 * PAIRS_PER_THREAD + 1
    text_of, references = rng.integers(0, len(texts), count), rng.integers(0, 20, (count, 12))
    lengths = rng.integers(0, 13, count)
    expected = [overlap(texts[which], row[:length])
                for which, row, length in zip(text_of, references, lengths, strict=True)]
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert overlaps(texts, references, lengths, text_of).tolist() == expected
        decision = exceeds_overlap(texts, references, lengths, 0.4, text_of)
        assert decision.tolist() == [value > 0.4 for value in expected]
    with pytest.raises(IndexError):
        overlaps(texts, references, lengths, text_of + 1)


def test_arrays_of_any_type_and_layout(tmp_path):
    rng = np.random.default_rng(6)
    tokens, references, lengths = rng.integers(0, 9, 200), rng.integers(0, 9, (6, 20)), np.array([20, 3, 0, 7, 20, 1])
    expected = overlaps(tokens, references, lengths).tolist()
    tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", np.int64, mode="r")
    unaligned = np.frombuffer(b"x" + tokens.tobytes(), np.int64, offset=1)
    for text in (mapped, unaligned, np.repeat(tokens, 2)[::2], tokens.astype(np.uint16), tokens.tolist()):
        for rows in (np.asfortranarray(references), references.astype(np.int32), references.tolist()):
            assert overlaps(text, rows, lengths.astype(np.int32)).tolist() == expected
    assert overlaps([], references[:0], lengths[:0], []).tolist() == []


def test_other_threads_run_while_pairs_are_compared():
    rng = np.random.default_rng(7)
    text, references = rng.integers(0, 2, 4000), rng.integers(0, 2, (1000, 128))
    overlap(text, references[0])

    def runs_meanwhile():
        stamps, busy = [], []

        def compare():
            busy.append(time.monotonic())
            overlaps(text, references, [128] * len(references))
            busy.append(time.monotonic())

        worker = threading.Thread(target=compare)
        worker.start()
        while worker.is_alive():
            stamps.append(time.monotonic())
        first, last = busy
        return any(first + (last - first) / 4 < stamp < last - (last - first) / 4 for stamp in stamps)

    assert any(runs_meanwhile() for _ in range(20))  # on a busy machine this thread may not get a processor


@pytest.mark.parametrize("length", [2, 64, 128, 129, 300])
def test_strands_are_as_old_as_the_span_allows(length):
    reference = [0, *[1] * (length - 2), 2]
    for around in ([], [1] * 3 * length, [2] * 3 * length):
        for more, expected in ((0, 1.0), (1, (length - 1) / length)):
            text = [*around, 0, *[1] * (2 * length - 2 + more), 2, *around]
            assert overlap(text, reference) == expected


@pytest.mark.parametrize("length", [13_200, 32_800])
def test_ages_that_need_more_bits(length):
    reference = np.arange(length)
    text = np.concatenate([reference[::-1], np.delete(reference, np.s_[5000:5132])])
    assert overlap(text, reference) == (length - 132) / length


def test_tokens_of_the_reference_alone_are_of_any_size():
    for text in ([3, 0, 5], [-1, 0, 2**40]):
        for token in (-2**63, -2, 1, 4, 6, 2**20, 2**40 + 1, 2**63 - 1):
            assert overlap(text, [*text, token]) == 3 / 4
            assert overlap(text, [token]) == 0.0


def test_works_where_no_compiled_code_can_be_kept(monkeypatch):
    from numba.core import caching

    from megatron_m3.retrieval import combing

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])  # what numba is left with in read-only folders
    with pytest.raises(RuntimeError, match="no locator"):
        combing.njit(cache=True)(combing.count_matches)
    kernel = combing._kernel.__wrapped__(np.dtype(np.uint8))
    monkeypatch.setattr(combing, "_kernel", lambda word: kernel)
    assert overlap([1, 9, 2, 9, 9, 3], [1, 2, 3]) == 1.0


def test_nothing_heavy_is_imported_before_the_first_overlap():
    look = "import sys, megatron_m3.retrieval; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", look], check=True)


def test_package_exports_the_function():
    assert package_overlap is overlap
