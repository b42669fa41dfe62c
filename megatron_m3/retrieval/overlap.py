"""The leakage filter (eq. 6): how much of a reference a text already contains, word order kept.

Exact, and quick for long texts: only windows of the text that could beat what is known are compared. A window's
longest common subsequence grows by at most one for each of the reference's tokens that enters it, and never exceeds
the number of tokens it shares with the reference, so most windows are passed over without a look.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from rapidfuzz.distance import LCSseq

FIRST_CODE = 48


def overlap(tokens: ArrayLike | Sequence[int], reference: ArrayLike | Sequence[int]) -> float:
    """Share of ``reference`` that ``tokens`` contain, in order and close together (eq. 6).

    The longest common subsequence of the two whose matched positions j1 < ... < jm in ``tokens`` span at most twice the
    reference, jm - j1 + 1 <= 2 * |reference|, divided by |reference|. An empty reference overlaps with nothing: 0.
    """
    reference = np.asarray(reference, dtype=np.int64)
    if not reference.size:
        return 0.0
    return _longest(np.asarray(tokens, dtype=np.int64), reference, at_least=1, enough=reference.size) / reference.size


def exceeds_overlap(tokens: ArrayLike, references: np.ndarray, lengths: np.ndarray, limit: float) -> np.ndarray:
    """Whether each reference's :func:`overlap` with ``tokens`` is larger than ``limit``; the decision is exact.

    Args:
        tokens: token ids of the text, [T].
        references: token ids, [N, L]; what lies beyond a reference's length is not read.
        lengths: tokens in each reference, [N]; 0 never exceeds.
        limit: largest overlap allowed.

    Returns:
        bool [N].
    """
    tokens, references, lengths = np.asarray(tokens, np.int64), np.asarray(references, np.int64), np.asarray(lengths)
    result = np.zeros(len(references), dtype=bool)
    shared = _num_shared(tokens, references, lengths)
    for row in np.flatnonzero((lengths > 0) & (shared > limit * lengths - 1e-6)):
        length = int(lengths[row])
        need = _smallest_above(limit, length)
        result[row] = need <= length and _longest(tokens, references[row, :length], at_least=need, enough=need) >= need
    return result


def _smallest_above(limit: float, length: int) -> int:
    """The smallest number of matches whose share of ``length`` is larger than ``limit``."""
    need = max(0, int(limit * length) - 1)
    while need / length <= limit:
        need += 1
    return need


def _num_shared(tokens: np.ndarray, references: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens that the whole text shares with each reference, order ignored, [N]: an upper bound on the matches."""
    if not tokens.size or not references.size:
        return np.zeros(len(references), dtype=np.int64)
    known, counts = np.unique(tokens, return_counts=True)
    columns = np.arange(references.shape[1])
    ordered = np.sort(np.where(columns < lengths[:, None], references, -1), axis=1)
    starts = np.ones_like(ordered, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    occurrence = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    place = np.minimum(np.searchsorted(known, ordered), len(known) - 1)
    found = (ordered >= 0) & (known[place] == ordered) & (occurrence < counts[place])
    return found.sum(axis=1)


def _longest(tokens: np.ndarray, reference: np.ndarray, *, at_least: int, enough: int) -> int:
    """Matches of eq. 6: the largest number over all windows of 2 * |reference| tokens.

    Exact between ``at_least`` and ``enough``; some number below ``at_least``, or not below ``enough``, otherwise.
    """
    alphabet, reference_codes = np.unique(reference, return_inverse=True)
    place = np.minimum(np.searchsorted(alphabet, tokens), len(alphabet) - 1)
    positions = np.flatnonzero(alphabet[place] == tokens)
    if len(positions) < at_least:
        return 0
    codes = place[positions]
    ends = np.searchsorted(positions, positions + 2 * len(reference))
    bounds = _window_bounds(codes, ends, np.bincount(reference_codes))
    text, pattern = _as_text(codes), _as_text(reference_codes)

    best, need = 0, at_least
    start = int(bounds.argmax())
    if bounds[start] >= need:
        best = LCSseq.similarity(text[start : ends[start]], pattern)
        need = max(need, best + 1)
    candidates = np.flatnonzero(bounds >= need)
    candidate_ends = ends[candidates]
    index = 0
    while best < enough and index < len(candidates):
        start = candidates[index]
        if bounds[start] < need:
            index += 1
            continue
        found = LCSseq.similarity(text[start : ends[start]], pattern)
        best, need = max(best, found), max(need, found + 1)
        # A window that begins later needs this many more tokens of the reference at its end.
        index = max(index + 1, int(np.searchsorted(candidate_ends, ends[start] + need - found)))
    return best


def _window_bounds(codes: np.ndarray, ends: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Tokens that the window beginning at each of the text's tokens shares with the reference, order ignored.

    ``codes``: the text's tokens that are in the reference; ``ends``: where the window that begins at each ends;
    ``allowed``: how often the reference has each token. Occurrence j of a token counts in a window that begins at s if
    the window reaches j and holds fewer than ``allowed`` of that token before j.
    """
    order = np.argsort(codes, kind="stable")
    ordered, counts = codes[order], np.bincount(codes, minlength=len(allowed))
    first = (np.cumsum(counts) - counts)[ordered]
    rank = np.arange(len(codes)) - allowed[ordered]
    earliest = np.zeros(len(codes), dtype=np.int64)
    earliest[order] = np.where(rank >= first, order[np.maximum(rank, 0)] + 1, 0)
    reach = np.searchsorted(ends, np.arange(len(codes)), side="right")
    change = np.bincount(np.maximum(earliest, reach), minlength=len(codes) + 1)
    change[1:] -= 1
    return np.cumsum(change[:-1])


def _as_text(codes: np.ndarray) -> str:
    """Codes as characters, the form that rapidfuzz compares fastest."""
    return (codes + FIRST_CODE).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
