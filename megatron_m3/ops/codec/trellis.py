"""Trellis-coded quantization: numbers of few bits each, rounded together.

The codes of a sequence of numbers, b_i bits each, are one stream of bits. The value of number i is the entry of a table
(one for each number of bits) at the last STATE_BITS bits of the stream up to and with its own: 2**STATE_BITS values for
the price of b_i bits, of which each choice leaves 2**b_i to the next number. Which stream is the least wrong is found
by Viterbi's algorithm; decoding is a look-up at known places. At 2 to 4 bits the error is a third less than that of
the best scalar quantizer, at others a fifth (Marcellin and Fischer, 1990; the window is that of QTIP, Tseng and others,
2024).

Letters: T numbers of a sequence, N sequences, S states, B bytes of a code.
"""

import torch
from torch import Tensor

MAX_BITS = 8
"""Most bits of a number."""
STATE_BITS = 9
"""Bits of the stream that a value depends on; from MAX_BITS to 9, so that they lie in two bytes."""
STATES = 1 << STATE_BITS
STRIDE = 181
"""Odd; entries of a table that differ by 1 differ by this much in rank, so that all close states are far values."""
CHUNK = 4096
"""Sequences whose numbers are made and searched together."""
NORMAL_ERRORS = (1.0, 0.287, 0.0777, 0.0210, 0.00575, 0.00184, 0.000479, 0.000128, 0.0000356)
"""Mean squared error of normal numbers of variance 1, by bits, with trained tables."""


def start_tables() -> Tensor:
    """Tables for normal numbers of variance 1 before they are trained, float32 [MAX_BITS + 1, S]; 0 bits are 0."""
    rank = torch.arange(STATES) * STRIDE % STATES
    values = torch.special.ndtri((rank.double() + 0.5) / STATES)
    # with many bits, the best values are as dense as the cube root of the numbers' density
    wider = (1 + torch.arange(MAX_BITS) / 6).clamp(max=3**0.5)
    return torch.cat([torch.zeros(1, STATES), (wider[:, None] * values).float()])


def search(numbers_TN: Tensor, tables_TS: Tensor, bits: list[int]) -> Tensor:
    """States int64 [T, N] of the least wrong streams, which begin behind zeros.

    Args:
        numbers_TN: whole numbers, as float32; so sums of squares are exact and the result is the same everywhere.
        tables_TS: their tables in the same unit, whole numbers as well.
        bits: of each number, 1 to MAX_BITS.

    Raises:
        UnsupportedError: numbers on a CUDA device, and no Triton.
    """
    if not numbers_TN.numel():
        return torch.zeros(numbers_TN.shape, dtype=torch.int64, device=numbers_TN.device)
    if numbers_TN.is_cuda:
        from megatron_m3.ops.codec import triton_trellis

        return triton_trellis.search(numbers_TN, tables_TS, bits)
    from megatron_m3.ops.codec import compiled_trellis

    return compiled_trellis.search(numbers_TN, tables_TS, bits)


def search_plainly(numbers_TN: Tensor, tables_TS: Tensor, bits: list[int]) -> Tensor:
    """:func:`search` in plain torch, on any device."""
    count = numbers_TN.shape[1]
    cost_SN = numbers_TN.new_full((STATES, count), torch.inf)
    cost_SN[0] = 0
    error_SN, least = torch.empty_like(cost_SN), []
    for number_N, table_S, shift in zip(numbers_TN, tables_TS, bits, strict=True):
        # states that differ in their oldest bits alone are followed by the same
        least.append(cost_SN.view(1 << shift, STATES >> shift, count).amin(0))
        torch.sub(number_N, table_S[:, None], out=error_SN)
        error = error_SN.view(STATES >> shift, 1 << shift, count)
        torch.addcmul(least[-1][:, None], error, error, out=cost_SN.view(error.shape))
    return _trace(cost_SN.argmin(0), numbers_TN, tables_TS, bits, least)


def _trace(state_N: Tensor, numbers_TN: Tensor, tables_TS: Tensor, bits: list[int], least: list[Tensor]) -> Tensor:
    """The states before ``state_N``, the last ones; ``least`` are the costs of the best ways to each step."""
    states = [state_N]
    for step in range(len(bits) - 1, 0, -1):
        after_N, shift, before_shift = states[-1] >> bits[step], bits[step], bits[step - 1]
        oldest = torch.arange(1 << shift, device=state_N.device)[:, None] << (STATE_BITS - shift)
        place = ((after_N + oldest) >> before_shift) * len(state_N) + torch.arange(len(state_N), device=state_N.device)
        error = numbers_TN[step - 1] - tables_TS[step - 1].view(1 << shift, -1).index_select(1, after_N)
        cost = least[step - 1].take(place) + error * error
        states.append(after_N + (cost.argmin(0) << (STATE_BITS - shift)))
    return torch.stack(states[::-1])


def pack(states_TN: Tensor, bits: list[int]) -> Tensor:
    """Codes uint8 [N, B] of sequences of states; ``bits`` fill whole bytes."""
    place_J = [(number, shift) for number, count in enumerate(bits) for shift in reversed(range(count))]
    number_J, shift_J = torch.tensor(place_J, device=states_TN.device).view(-1, 2).T
    bits_JN = (states_TN.to(torch.uint8)[number_J] >> shift_J.to(torch.uint8)[:, None]) & 1
    codes_BN = bits_JN.new_zeros(len(place_J) // 8, states_TN.shape[1])
    for place in range(8):
        codes_BN |= bits_JN[place::8] << (7 - place)
    return codes_BN.T.contiguous()


def look_up(codes_NB: Tensor, ends_T: Tensor, rows_T: Tensor, tables: Tensor) -> Tensor:
    """Values float32 [T, N]: those of row ``rows_T`` of ``tables`` at the bits that end before bit ``ends_T``."""
    starts_T = ends_T + (16 - STATE_BITS)
    if codes_NB.is_cuda:
        return look_up_plainly(codes_NB, starts_T, rows_T, tables)
    from megatron_m3.ops.codec import compiled_trellis

    return compiled_trellis.look_up(codes_NB, starts_T, rows_T, tables)


def look_up_plainly(codes_NB: Tensor, starts_T: Tensor, rows_T: Tensor, tables: Tensor) -> Tensor:
    """:func:`look_up` in plain torch, on any device; ``starts_T`` are the first bits with two zero bytes before all."""
    device = codes_NB.device
    padded = torch.zeros(codes_NB.shape[1] + 3, len(codes_NB), dtype=torch.int32, device=device)
    padded[2:-1] = codes_NB.T
    pairs = (padded[:-1] << 8) | padded[1:]
    word_T, right_T1 = (starts_T >> 3).to(device), (16 - STATE_BITS - (starts_T & 7)).int()[:, None].to(device)
    state_TN = (pairs[word_T] >> right_T1) & (STATES - 1)
    return tables.flatten()[state_TN + (STATES * rows_T).int()[:, None].to(device)]
