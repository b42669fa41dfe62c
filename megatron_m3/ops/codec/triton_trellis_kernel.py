"""Viterbi's algorithm for the trellis of a transform code, a program for a sequence.

A state's best predecessor is one of those whose last bits are its first ones; states that differ in their newest bits
alone share it. The costs of all states stay in registers; of every number only the choices are kept, packed into
``WORDS`` words, and read again on the way back.
"""

# Triton reads annotations of kernel arguments as their types.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

WORDS = tl.constexpr(8)
"""32-bit words that hold the choices of one number."""


@triton.jit
def advance(cost, number, table, choices, BITS: tl.constexpr, STATES: tl.constexpr):
    """Costs of all states after one more number of ``BITS`` bits; writes its choices."""
    SHARED: tl.constexpr = STATES >> BITS
    # choices in a word: a power of two, so that places are found by shifts
    EACH: tl.constexpr = min(SHARED, 32 if BITS == 1 else 16 if BITS == 2 else 8 if BITS <= 4 else 4)
    least, oldest = tl.min(tl.reshape(cost, (1 << BITS, SHARED)), 0, return_indices=True)
    shifts = tl.arange(0, EACH) * BITS
    words = tl.sum(tl.reshape(oldest, (SHARED // EACH, EACH)) << shifts[None, :], 1)
    tl.store(choices + tl.arange(0, SHARED // EACH), words)
    error = number - table
    return tl.reshape(tl.broadcast_to(least[:, None], (SHARED, 1 << BITS)), (STATES,)) + error * error


@triton.jit
def search_kernel(
    numbers, tables, runs, bits, choices, states, length, num_runs, STATE_BITS: tl.constexpr, MAX_BITS: tl.constexpr
):
    """States int16 [N, T] of the least wrong stream of a sequence of ``numbers`` [N, T].

    ``runs`` [num_runs, 3] are bits, first number and the one after the last, of numbers with equally many ``bits`` [T].
    """
    STATES: tl.constexpr = 1 << STATE_BITS
    every = tl.arange(0, STATES)
    sequence = tl.program_id(0).to(tl.int64)
    numbers += sequence * length
    states += sequence * length
    choices += sequence * length * WORDS
    cost = tl.where(every == 0, 0.0, float("inf"))
    for run in range(num_runs):
        run_bits, first, last = tl.load(runs + 3 * run), tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)
        for BITS in tl.static_range(1, MAX_BITS + 1):
            for step in range(tl.where(run_bits == BITS, first, last), last):
                table = tl.load(tables + step * STATES + every)
                cost = advance(cost, tl.load(numbers + step), table, choices + step * WORDS, BITS, STATES)
    # each thread reads what all have written
    tl.debug_barrier()
    state = tl.argmin(cost, 0)
    for back in range(1, length + 1):
        step = length - back
        tl.store(states + step, state.to(tl.int16))
        count = tl.load(bits + step)
        shared = state >> count
        log_each = tl.where(count > 4, 2, tl.where(count > 2, 3, tl.where(count > 1, 4, 5)))
        word = tl.load(choices + step * WORDS + (shared >> log_each))
        oldest = (word >> ((shared & ((1 << log_each) - 1)) * count)) & ((1 << count) - 1)
        state = shared + (oldest << (STATE_BITS - count))
