"""Matches of eq. 6 for many references at once, compiled: one pass over a text gives every window's longest common
subsequence with a reference (semi-local comparison by combing, Tiskin 2008, arXiv:0707.3619).

Rows are the reference's tokens, columns the text's; columns whose token is not in the reference change nothing and are
left out. A strand enters at the left of each row and at the top of each column, and goes right or down. Where row and
column have the same token the two strands turn away from each other; elsewhere they cross, unless they crossed before,
which is when the younger one comes from the left. Then the longest common subsequence of the reference with columns
s to e - 1 is e - s less the strands that enter at the top at s or later and leave at the bottom before e.

As no window is longer than the span, a strand need only be known by its age: how many columns ago it entered, up to
the span. So numbers are small whatever the text's length, and those of many rows are one vector. Cells on a diagonal
are independent; a strip of rows goes along the columns with its strands in vector registers, and what leaves it at the
bottom enters the next at the top.

Importing this module imports numba.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from megatron_m3.platform.compiled import compile_kernel

STRIP = 128
"""Rows that are combed at once."""
NO_COLUMN, NO_ROW, FIRST_CODE = 0, 1, 2
"""Codes of columns beyond the text and of rows without an equal in it; tokens that both have begin with the third."""


def count_matches(
    tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, references: np.ndarray, lengths: np.ndarray,
    limit: float, vocabulary: int,
) -> np.ndarray:
    """Matches of eq. 6 of each reference with its text. Other Python threads run meanwhile.

    Args:
        tokens: texts one after the other, from 0 to ``vocabulary`` - 1, int64 [T].
        begins: where the text of each reference begins, int64 [N]; quickest where those of one text stand together.
        ends: where it ends, int64 [N].
        references: int64 [N, L], any numbers, each row filled up with anything.
        lengths: tokens in each reference, int64 [N].
        limit: shares of a reference that are not larger need not be told apart.
        vocabulary: as many numbers are kept for each of it.

    Returns:
        int64 [N]: exact where they are a larger share of the reference than ``limit``, else some number that is not.
    """
    word = np.min_scalar_type(max(2 * lengths.max(initial=0) - 1, FIRST_CODE))
    frequency, codes = np.zeros(vocabulary, np.int32), np.zeros(vocabulary, word)
    result = np.zeros(len(references), np.int64)
    _kernel(word)(tokens, begins, ends, references, lengths, limit, frequency, codes, result)
    return result


@functools.cache
def _kernel(word: "np.dtype[Any]") -> Callable[..., None]:
    """The compiled kernel, for ages and codes of this type: bytes suffice for references of at most 128 tokens."""
    line, rows = (types.Array(types.int64, dimensions, "C", readonly=True) for dimensions in (1, 2))
    codes = types.Array(from_dtype(word), 1, "C")
    signature = types.void(line, line, line, rows, line, types.float64, types.int32[::1], codes, types.int64[::1])
    return compile_kernel(signature, _count_matches)


def _count_matches(
    tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, references: np.ndarray, lengths: np.ndarray,
    limit: float, frequency: np.ndarray, codes: np.ndarray, result: np.ndarray,
) -> None:
    first = 0
    while first < begins.size:
        last = first + 1
        while last < begins.size and begins[last] == begins[first] and ends[last] == ends[first]:
            last += 1
        text = tokens[begins[first] : ends[first]]
        for token in text:
            frequency[token] += 1
        _compare_with_text(text, references[first:last], lengths[first:last], limit, frequency, codes,
                           result[first:last])
        for token in text:
            frequency[token] = 0
        first = last


@njit
def _compare_with_text(
    text: np.ndarray, references: np.ndarray, lengths: np.ndarray, limit: float, frequency: np.ndarray,
    codes: np.ndarray, result: np.ndarray,
) -> None:
    positions, backwards = np.empty(text.size + 1, np.int32), np.zeros(text.size + 2 * STRIP, codes.dtype)
    for number in range(len(references)):
        reference = references[number, : lengths[number]]
        rows = np.full((2, -(-reference.size // STRIP) * STRIP), NO_ROW, codes.dtype)
        shared = _mark(reference, frequency, codes, rows)
        if reference.size and shared / reference.size > limit:
            count, place = 0, backwards.size - STRIP
            for position in range(text.size):
                code = codes[text[position]]
                positions[count], backwards[place - count] = position, code
                count += code >= FIRST_CODE
            backwards[place - count - STRIP + 1 : place - count + 1] = NO_COLUMN
            ages = _comb(rows, backwards[place - count - STRIP + 2 : place + STRIP], count)
            result[number] = _best_window(ages, positions[:count], 2 * reference.size)
        for token in reference:
            if 0 <= token < codes.size:
                codes[token] = 0


@njit
def _mark(reference: np.ndarray, frequency: np.ndarray, codes: np.ndarray, rows: np.ndarray) -> int:
    """Give the reference's tokens codes, in ``codes``, in ``rows[0]`` and, where they stand first, in ``rows[1]``.

    Returns:
        tokens that the text and the reference share, order ignored: an upper bound on the matches.
    """
    shared, used = 0, np.zeros(reference.size, np.int32)
    for row in range(reference.size):
        token = reference[row]
        if 0 <= token < codes.size and frequency[token]:
            if not codes[token]:
                codes[token] = rows[1, row] = FIRST_CODE + row
            code = rows[0, row] = codes[token]
            shared += used[code - FIRST_CODE] < frequency[token]
            used[code - FIRST_CODE] += 1
    return shared


@njit
def _comb(rows: np.ndarray, backwards: np.ndarray, count: int) -> np.ndarray:
    """Ages, less one, of the strands that leave at the bottom of each of ``count`` columns; the largest is any beyond.

    ``backwards``: codes of the columns from the last to the first, with :data:`STRIP` - 1 of no code before and after.
    """
    through = np.zeros(count + rows.shape[1] // STRIP * (STRIP - 1), rows.dtype)
    first = 0
    for row in range(0, rows.shape[1], STRIP):
        _comb_strip(rows[0, row : row + STRIP], rows[1, row : row + STRIP], backwards,
                    through[first : first + count + STRIP - 1])
        first += STRIP - 1
    return through[first:]


@intrinsic
def _comb_strip(_: Any, rows: Any, firsts: Any, backwards: Any, through: Any) -> Any:
    """Comb :data:`STRIP` rows, in vectors, since numba's own loops keep nothing in registers from one to the next.

    ``rows``: their codes. ``firsts``: the same where no row above has it. ``backwards``: as in :func:`_comb`.
    ``through``: of each column what enters at the top; then what left at the bottom :data:`STRIP` - 1 columns before.

    A strand that enters in this very column and one that did in the last have the same number, 0. That does no harm:
    the former stays in its column down to the first row of its token, and turns there into one that is 0.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        arrays = [context.make_array(kind)(context, builder, value)
                  for kind, value in zip(signature.args, values, strict=True)]
        index, vector = ir.IntType(32), ir.VectorType(context.get_data_type(rows.dtype), STRIP)
        zero, one, largest, all_but_largest = (ir.Constant(vector, [value] * STRIP) for value in (0, 1, -1, -2))
        one_down = ir.Constant(ir.VectorType(index, STRIP), [STRIP, *range(STRIP - 1)])

        def load(array: Any, place: ir.Value) -> ir.Value:
            pointer = builder.bitcast(builder.gep(array.data, [place]), vector.as_pointer())
            return builder.load(pointer, align=1)

        row_codes, first_codes = (load(array, index(0)) for array in arrays[:2])
        across, down = (cgutils.alloca_once_value(builder, value) for value in (largest, zero))
        diagonals = cgutils.unpack_tuple(builder, arrays[3].shape, 1)[0]
        with cgutils.for_range(builder, diagonals) as loop:
            facing = load(arrays[2], builder.sub(builder.sub(diagonals, loop.index), diagonals.type(1)))
            passing = builder.gep(arrays[3].data, [loop.index])
            entering = builder.insert_element(zero, builder.load(passing), index(0))
            left, top = builder.load(across), builder.shuffle_vector(builder.load(down), entering, one_down)
            older = builder.select(builder.icmp_unsigned(">", left, top), left, top)
            right = builder.select(builder.icmp_unsigned("==", facing, row_codes), top, older)
            below = builder.xor(builder.xor(left, top), right)
            younger = builder.icmp_unsigned("<", right, all_but_largest)
            aged = builder.add(builder.select(younger, right, all_but_largest), one)
            turned = builder.icmp_unsigned("==", facing, first_codes)
            builder.store(builder.select(turned, zero, aged), across)
            builder.store(below, down)
            builder.store(builder.extract_element(below, index(STRIP - 1)), passing)
        return context.get_dummy_value()

    return types.void(rows, firsts, backwards, through), generate


@njit
def _best_window(ages: np.ndarray, positions: np.ndarray, span: int) -> int:
    """The most matches in a window of ``span`` positions.

    A window that begins at s has the matches e - s less the strands that entered at s or later and leave before e.
    As many columns as leave before e, that is those of which the window at s or an earlier one is the first to reach
    them, are e; so the matches are the strands that entered before s and leave before e, less s.
    """
    passed = np.zeros(positions.size + 1, np.int32)
    start = 0
    for column in range(positions.size):
        while positions[start] <= positions[column] - span:
            start += 1
        after = column - np.int64(ages[column])
        passed[after if after > start else start] += 1
    best = strands = 0
    for begin in range(positions.size):
        strands += passed[begin]
        best = max(best, strands - begin)
    return best
