"""Matches of eq. 6 for many references at once, compiled: one pass over a text gives every window's longest common
subsequence with a reference (semi-local comparison by combing, Tiskin 2008, arXiv:0707.3619).

Rows are the reference's tokens, columns the text's. A strand enters at the left of each row and at the top of each
column, and goes right or down. Where row and column have the same token the two strands turn away from each other;
elsewhere they cross, unless they crossed before. Then the longest common subsequence of the reference with columns
s to e - 1 is e - s less the strands that enter at the top at s or later and leave at the bottom before e.

Strands are numbered in the order in which they enter, from the lowest row up and then from the first column on, so
that two strands have crossed when the larger number comes from the left. Cells on a diagonal are independent: each
step of the inner loop is a comparison and a minimum, which compiles to vectors of 16-bit numbers. Columns whose token
is not in the reference change nothing and are left out.

Importing this module imports numba.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import njit, types

from megatron_m3.platform.compiled import aligned_zeros, compile_kernel

LANES = 32
"""Rows are filled up to a multiple of this many, a vector of the widest kind."""
LEAST_PIECE = 4096
"""Columns that are combed at once, at least: they fit in the nearest cache."""
NO_COLUMN, NO_ROW, FIRST_CODE = 0, 1, 2
"""Codes of columns beyond the text and of rows without an equal in it; tokens that both have begin with the third."""


def count_matches(
    tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, references: np.ndarray, lengths: np.ndarray,
    limit: float,
) -> np.ndarray:
    """Matches of eq. 6 of each reference with its text. Other Python threads run meanwhile.

    Args:
        tokens: texts one after the other, int64 [T].
        begins: where the text of each reference begins, int64 [N]; quickest where those of one text stand together.
        ends: where it ends, int64 [N].
        references: int64 [N, L], each row filled up with anything.
        lengths: tokens in each reference, int64 [N].
        limit: shares of a reference that are not larger need not be told apart.

    Returns:
        int64 [N]: exact where they are a larger share of the reference than ``limit``, else some number that is not.
    """
    rows = -(-references.shape[1] // LANES) * LANES
    piece = max(LEAST_PIECE, 4 * rows)
    wide = rows + piece + 1 > np.iinfo(np.uint16).max
    result = np.zeros(len(references), np.int64)
    scratch = aligned_zeros(5 * rows + 2 * piece, np.uint32 if wide else np.uint16)
    _kernel(wide)(tokens, begins, ends, references, lengths, limit, scratch, piece, result)
    return result


@functools.cache
def _kernel(wide: bool) -> Callable[..., None]:
    """The compiled kernel, for strand numbers of 32 bits or of 16, which suffice for references of 13 thousand tokens.

    Only the latter is kept on disk.
    """
    line, rows = (types.Array(types.int64, dimensions, "C", readonly=True) for dimensions in (1, 2))
    word = types.uint32 if wide else types.uint16
    signature = types.void(line, line, line, rows, line, types.float64, word[::1], types.int64, types.int64[::1])
    return compile_kernel(signature, _count_matches, keep=not wide)


def _count_matches(
    tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, references: np.ndarray, lengths: np.ndarray,
    limit: float, scratch: np.ndarray, piece: int, result: np.ndarray,
) -> None:
    first = 0
    while first < begins.size:
        last = first + 1
        while last < begins.size and begins[last] == begins[first] and ends[last] == ends[first]:
            last += 1
        _compare_with_text(tokens[begins[first] : ends[first]], references[first:last], lengths[first:last],
                           limit, scratch, piece, result[first:last])
        first = last


@njit
def _compare_with_text(
    tokens: np.ndarray, references: np.ndarray, lengths: np.ndarray, limit: float, scratch: np.ndarray, piece: int,
    result: np.ndarray,
) -> None:
    table, places = _index(tokens)
    frequency, room = np.zeros(tokens.size, np.int32), np.zeros(tokens.size, np.int32)
    for place in places:
        frequency[place] += 1
    codes = np.zeros(tokens.size, scratch.dtype)
    positions, columns = np.empty(tokens.size + 1, np.int32), np.empty(tokens.size + 1, scratch.dtype)
    row_room = (scratch.size - 2 * piece) // 5
    for number in range(len(references)):
        reference = references[number, : lengths[number]]
        shared = _mark(reference, tokens, table, frequency, room, codes, scratch[:row_room])
        if reference.size and shared / reference.size > limit:
            count = 0
            for position in range(tokens.size):
                code = codes[places[position]]
                positions[count], columns[count] = position, code
                count += code >= FIRST_CODE
            rows = -(-reference.size // LANES) * LANES
            span = 2 * reference.size
            result[number] = _longest(scratch, row_room, rows, positions[:count], columns[:count], span, piece)
        for token in reference:
            place = _find(token, tokens, table)
            if place >= 0:
                room[place] = codes[place] = 0


@njit
def _index(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash table of each distinct token's first place in a text, and that place for every token of it."""
    size = 16
    while size < 2 * tokens.size:
        size *= 2
    table, places = np.full(size, -1, np.int32), np.empty(tokens.size, np.int32)
    for position in range(tokens.size):
        slot = _slot(tokens[position], size)
        while True:
            place = table[slot] if table[slot] >= 0 else position
            if tokens[place] == tokens[position]:
                break
            slot = (slot + 1) & (size - 1)
        table[slot] = places[position] = place
    return table, places


@njit
def _slot(token: int, size: int) -> int:
    return ((token * 0x9E3779B1) >> 16) & (size - 1)


@njit
def _find(token: int, tokens: np.ndarray, table: np.ndarray) -> int:
    """First place of a token in the text, -1 if it has none."""
    slot = _slot(token, table.size)
    while table[slot] >= 0 and tokens[table[slot]] != token:
        slot = (slot + 1) & (table.size - 1)
    return table[slot]


@njit
def _mark(
    reference: np.ndarray, tokens: np.ndarray, table: np.ndarray, frequency: np.ndarray, room: np.ndarray,
    codes: np.ndarray, rows: np.ndarray,
) -> int:
    """Give the reference's tokens codes, in ``rows`` and, at their first places in the text, in ``codes``.

    Returns:
        tokens that the text and the reference share, order ignored: an upper bound on the matches.
    """
    shared, rows[:] = 0, NO_ROW
    for row in range(reference.size):
        place = _find(reference[row], tokens, table)
        if place >= 0:
            if room[place] == 0:
                codes[place] = FIRST_CODE + row
            rows[row] = codes[place]
            shared += room[place] < frequency[place]
            room[place] += 1
    return shared


@njit
def _longest(
    scratch: np.ndarray, row_room: int, rows: int, positions: np.ndarray, columns: np.ndarray, span: int, piece: int
) -> int:
    """Largest number of matches in a window of ``span`` positions, from the columns that the reference has too."""
    across, down = scratch[row_room : row_room + rows], scratch[2 * row_room : 2 * row_room + rows]
    backwards, leaving = scratch[3 * row_room : -piece], scratch[-piece:]
    best = first = last = 0
    while last < positions.size:
        last = min(positions.size, first + piece)
        count = last - first
        backwards[: rows - 1] = NO_COLUMN
        backwards[rows - 1 + count : 2 * rows + count - 2] = NO_COLUMN
        for column in range(count):
            backwards[rows - 1 + column] = columns[last - 1 - column]
        _comb(scratch[:rows], backwards[: 2 * rows + count - 2], across, down, leaving[:count])
        found, cut = _best_window(leaving[:count], rows, positions[first:last], span)
        best, first = max(best, found), first + cut
    return best


@njit
def _comb(rows: np.ndarray, backwards: np.ndarray, across: np.ndarray, down: np.ndarray, leaving: np.ndarray) -> None:
    """The strands that leave at the bottom of each column.

    ``rows``: codes of the reference. ``backwards``: codes of the columns from the last to the first, with as many as
    there are rows, less one, of no code before and after. ``across`` and ``down`` hold, for each row, the strand that
    left its cell on the last diagonal.
    """
    size, count = rows.size, leaving.size
    for row in range(size):
        across[row] = size - 1 - row
        down[row] = size + count
    for diagonal in range(size + count - 1):
        first = size + count - 2 - diagonal
        facing = backwards[first : first + size]
        above = down.dtype.type(size + min(diagonal, count))
        for row in range(size):
            left, top = across[row], above
            above = down[row]
            right = top if facing[row] == rows[row] or left > top else left
            across[row] = right
            down[row] = left ^ top ^ right
        if diagonal >= size - 1:
            leaving[diagonal - size + 1] = down[size - 1]


@njit
def _best_window(leaving: np.ndarray, rows: int, positions: np.ndarray, span: int) -> tuple[int, int]:
    """The most matches in a window of these columns, and the first column whose window may reach beyond the last.

    A window that begins at s has the matches e - s less the strands that entered at s or later and leave before e.
    As many columns as leave before e, that is those of which the window at s or an earlier one is the first to reach
    them, are e; so the matches are the strands that entered before s and leave before e, less s.
    """
    passed = np.zeros(positions.size + 1, np.int32)
    start = 0
    for column in range(positions.size):
        while positions[start] <= positions[column] - span:
            start += 1
        passed[max(start, leaving[column] + 1 - rows)] += 1
    best = strands = 0
    for begin in range(positions.size):
        strands += passed[begin]
        best = max(best, strands - begin)
    return best, start
