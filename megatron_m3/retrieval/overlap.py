"""The leakage filter (eq. 6): how much of a reference a text already contains, word order kept.

Exact for every text and reference; ``combing.py`` holds the method, which is compiled: it is imported, and compiled if
it never was on this kind of machine, when the first overlap is asked for. Large batches are shared by OMP_NUM_THREADS
threads.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

PAIRS_PER_THREAD = 256
"""Fewest pairs that are worth a thread."""
MOST_TOKENS = 1 << 20
"""Largest vocabulary that a table is made of; tokens of a larger one are numbered anew."""


def overlap(tokens: Sequence[int] | np.ndarray, reference: Sequence[int] | np.ndarray) -> float:
    """Share of ``reference`` that ``tokens`` contain, in order and close together (eq. 6).

    The longest common subsequence of the two whose matched positions j1 < ... < jm in ``tokens`` span at most twice the
    reference, jm - j1 + 1 <= 2 * |reference|, divided by |reference|. An empty reference overlaps with nothing: 0.
    """
    references = np.asarray(reference, np.int64)[None]
    return float(overlaps(tokens, references, np.array([references.size]))[0])


def overlaps(
    tokens: Sequence[Any] | np.ndarray, references: ArrayLike, lengths: ArrayLike,
    text_of: ArrayLike | None = None,
) -> np.ndarray:
    """The :func:`overlap` of each reference with a text, float64 [N]; arguments as :func:`exceeds_overlap` has them."""
    return _shares(tokens, references, lengths, 0, text_of)


def exceeds_overlap(
    tokens: Sequence[Any] | np.ndarray, references: ArrayLike, lengths: ArrayLike, limit: float,
    text_of: ArrayLike | None = None,
) -> np.ndarray:
    """Whether each reference's :func:`overlap` with a text is larger than ``limit``; the decision is exact.

    Args:
        tokens: token ids of the text, [T]; of several texts, [T] each, where ``text_of`` is given.
        references: token ids, [N, L]; what lies beyond a reference's length is not read.
        lengths: tokens in each reference, [N]; 0 never exceeds.
        limit: largest overlap allowed.
        text_of: the text, by its number, that each reference is compared with, [N]; best ascending.

    Returns:
        bool [N].
    """
    return _shares(tokens, references, lengths, limit, text_of) > limit


def _shares(
    tokens: Sequence[Any] | np.ndarray, references: ArrayLike, lengths: ArrayLike, limit: float,
    text_of: ArrayLike | None,
) -> np.ndarray:
    """Share of each reference, float64 [N]; exact where it is larger than ``limit``, else one that is not."""
    from megatron_m3.retrieval.combing import count_matches

    texts = [np.asarray(text, np.int64) for text in ([tokens] if text_of is None else tokens)]
    whole = _compact(np.concatenate([*texts, np.zeros(0, np.int64)]) if len(texts) != 1 else texts[0])
    references, lengths = _compact(references), _compact(lengths)
    vocabulary = int(whole.view(np.uint64).max(initial=0)) + 1
    if vocabulary > MOST_TOKENS:
        distinct, whole = np.unique(whole, return_inverse=True)
        places, vocabulary = np.searchsorted(distinct, references), len(distinct)
        references = np.where(distinct.take(places, mode="clip") == references, places, -1)
    bounds = np.cumsum([0, *map(len, texts)])
    which = np.zeros(len(lengths), np.int64) if text_of is None else np.asarray(text_of, np.int64)
    begins, ends = bounds[:-1][which], bounds[1:][which]

    def compare(part: slice) -> np.ndarray:
        matches = count_matches(whole, begins[part], ends[part], references[part], lengths[part], limit, vocabulary)
        return matches / np.maximum(lengths[part], 1)

    most = len(lengths) // PAIRS_PER_THREAD
    threads = min(most, _num_threads()) if most > 1 else 1
    if threads == 1:
        return compare(slice(None))
    size = -(-len(lengths) // threads)
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(compare, (slice(first, first + size)
                                                      for first in range(0, len(lengths), size)))))


def _compact(array: ArrayLike) -> np.ndarray:
    """As int64 in the order and alignment that the compiled code takes."""
    compact = np.ascontiguousarray(array, np.int64)
    return compact if compact.flags.aligned else compact.copy()


def _num_threads() -> int:
    """OMP_NUM_THREADS, or else the processors that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(given)) if given.isdigit() else len(os.sched_getaffinity(0))
