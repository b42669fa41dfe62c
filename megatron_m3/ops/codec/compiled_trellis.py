"""The trellis' search, compiled for the CPU: sequences side by side in vectors, their costs in the nearest caches; and
the look-ups of decoding.

The search finds the states that :func:`megatron_m3.ops.codec.trellis.search_plainly` finds. Of each step it keeps
which of the states that differ in their oldest bits alone was the best, a byte for each group of them.

Letters: T numbers of a sequence, N sequences, B bytes of a code, S states, L lanes; ``cost_SL`` and its parts are flat.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from megatron_m3.ops.codec.trellis import STATE_BITS, STATES
from megatron_m3.platform.compiled import aligned_zeros, compile_kernel

LANES = 64
"""Sequences side by side; fewer leave the compiler's checks to be seen, more leave the caches."""


def search(numbers_TN: Tensor, tables_TS: Tensor, bits: list[int]) -> Tensor:
    """States int64 [T, N] of the least wrong streams; as many threads as torch has share the sequences."""
    count, threads = numbers_TN.shape[1], torch.get_num_threads()
    padded = torch.nn.functional.pad(numbers_TN, (0, -count % LANES))
    states = torch.empty(padded.shape, dtype=torch.int64)
    step = -(-padded.shape[1] // (LANES * threads)) * LANES
    parts = [slice(first, first + step) for first in range(0, padded.shape[1], step)]

    def work(part: slice) -> None:
        _search(padded[:, part], tables_TS, bits, states[:, part])

    if len(parts) == 1:
        work(parts[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, parts))
    return states[:, :count]


def _search(numbers_TN: Tensor, tables_TS: Tensor, bits: list[int], states_TN: Tensor) -> None:
    groups = np.array([STATES >> shift for shift in bits])
    starts = np.concatenate([[0], groups.cumsum()])
    costs = aligned_zeros(2 * STATES * LANES, np.float32).reshape(2, -1)
    winner, winners = (aligned_zeros(size * LANES, dtype) for size, dtype in
                       ((STATES // 2, np.int32), (int(starts[-1]), np.uint8)))
    _kernel()(numbers_TN.numpy(), tables_TS.contiguous().numpy(), np.array(bits), starts, costs, winner, winners,
              states_TN.numpy())


def look_up(codes_NB: Tensor, starts_T: Tensor, rows_T: Tensor, tables: Tensor) -> Tensor:
    """What :func:`megatron_m3.ops.codec.trellis.look_up_plainly` gives, in one pass."""
    values_TN = torch.empty(len(starts_T), len(codes_NB))
    codes_BN = torch.nn.functional.pad(codes_NB.T, (0, 0, 2, 1)).contiguous()
    _look_up_kernel()(codes_BN.numpy(), starts_T.numpy(), rows_T.numpy(), tables.contiguous().numpy(),
                      values_TN.numpy())
    return values_TN


@functools.cache
def _look_up_kernel() -> Callable[..., None]:
    whole = types.int64[::1]
    return compile_kernel(
        types.void(types.uint8[:, ::1], whole, whole, types.float32[:, ::1], types.float32[:, ::1]), _look_up_all)


def _look_up_all(
    codes_BN: np.ndarray, starts_T: np.ndarray, rows_T: np.ndarray, tables: np.ndarray, values_TN: np.ndarray
) -> None:
    for number in range(starts_T.size):
        first, right = starts_T[number] >> 3, 16 - STATE_BITS - (starts_T[number] & 7)
        high_N, low_N, table_S = codes_BN[first], codes_BN[first + 1], tables[rows_T[number]]
        for place in range(high_N.size):
            pair = np.uint32(high_N[place]) << 8 | np.uint32(low_N[place])
            values_TN[number, place] = table_S[pair >> right & (STATES - 1)]


@functools.cache
def _kernel() -> Callable[..., None]:
    wide = types.Array(types.float32, 2, "A")
    return compile_kernel(
        types.void(wide, types.float32[:, ::1], types.int64[::1], types.int64[::1], types.float32[:, ::1],
                   types.int32[::1], types.uint8[::1], types.Array(types.int64, 2, "A")), _search_all)


def _search_all(
    numbers_TN: np.ndarray, tables_TS: np.ndarray, bits: np.ndarray, starts: np.ndarray, costs: np.ndarray,
    winner: np.ndarray, winners: np.ndarray, states_TN: np.ndarray,
) -> None:
    number_L = np.empty(LANES, np.float32)
    for first in range(0, numbers_TN.shape[1], LANES):
        cost_SL, next_SL = costs[0], costs[1]
        cost_SL[:] = np.inf
        cost_SL[:LANES] = 0
        for step in range(bits.size):
            number_L[:] = numbers_TN[step, first : first + LANES]
            groups = STATES >> bits[step]
            best_L, winner_L = cost_SL[: groups * LANES], winner[: groups * LANES]
            winner_L[:] = 0
            for oldest in range(1, 1 << bits[step]):
                _take_smaller(best_L, winner_L, cost_SL[oldest * groups * LANES :], oldest)
            _narrow(winner_L, winners[starts[step] * LANES :])
            _add_errors(best_L, number_L, tables_TS[step], next_SL, groups, bits[step])
            cost_SL, next_SL = next_SL, cost_SL
        _trace(cost_SL, bits, starts, winners, states_TN[:, first : first + LANES])


@njit
def _take_smaller(best_L: np.ndarray, winner_L: np.ndarray, other_L: np.ndarray, oldest: int) -> None:
    for place in range(best_L.size):
        other, best = other_L[place], best_L[place]
        is_less = other < best
        best_L[place] = other if is_less else best
        winner_L[place] = oldest if is_less else winner_L[place]


@njit
def _narrow(wide: np.ndarray, narrow: np.ndarray) -> None:
    for place in range(wide.size):
        narrow[place] = np.uint8(wide[place])


@njit
def _add_errors(
    best_L: np.ndarray, number_L: np.ndarray, table_S: np.ndarray, next_SL: np.ndarray, groups: int, shift: int
) -> None:
    for group in range(groups):
        least_L = best_L[group * LANES : (group + 1) * LANES]
        table, after_L = table_S[group << shift : (group + 1) << shift], next_SL[(group << shift) * LANES :]
        for newest in range(table.size):
            value, cost_L = table[newest], after_L[newest * LANES : (newest + 1) * LANES]
            for lane in range(LANES):
                error = number_L[lane] - value
                cost_L[lane] = least_L[lane] + error * error


@njit
def _trace(
    cost_SL: np.ndarray, bits: np.ndarray, starts: np.ndarray, winners: np.ndarray, states_TN: np.ndarray
) -> None:
    """From the best last states back; all lanes together, since each look waits for memory."""
    state_L = np.zeros(LANES, np.int64)
    for state in range(1, STATES):
        for lane in range(LANES):
            if cost_SL[state * LANES + lane] < cost_SL[state_L[lane] * LANES + lane]:
                state_L[lane] = state
    for step in range(bits.size - 1, -1, -1):
        shift, winner, after_N = bits[step], winners[starts[step] * LANES :], states_TN[step]
        for lane in range(LANES):
            state = state_L[lane]
            after_N[lane] = state
            group = state >> shift
            state_L[lane] = group + (np.int64(winner[group * LANES + lane]) << (STATE_BITS - shift))
