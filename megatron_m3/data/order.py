"""The order of the training sequences: a pure function of seed and epoch that needs no memory.

A Feistel network of keyed rounds is a bijection of the numbers below a power of four; walking it until the result is
below ``size`` makes it a permutation of any size (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

MASK = (1 << 64) - 1
ROUNDS = 6


def sequence_at(position: int, size: int, seed: int) -> int:
    """Which of ``size`` sequences stands at ``position`` of the endless order: each epoch holds every one once."""
    epoch, rank = divmod(position, size)
    return permute(rank, size, _mix(_mix(seed & MASK) ^ epoch))


def permute(index: int, size: int, key: int) -> int:
    """Where the permutation of ``range(size)`` that belongs to ``key`` sends ``index``."""
    half = (max(size - 1, 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    keys = [_mix(key + number) for number in range(ROUNDS)]
    while True:
        left, right = index >> half, index & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The finalizer of splitmix64: every output bit depends on every input bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31
