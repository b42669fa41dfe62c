"""How long a codec's training and coding take on this machine: a short sample on random vectors, scaled.

A codec that is quick to train is timed as it is. One with large codebooks is timed with small ones and without OPQ, and
scaled by the multiplications of both: coding compares a vector with all entries of a codebook, training does so some
times for each vector.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_m3.memory.bank import BankSettings
from megatron_m3.memory.codec import CPU, Codec
from megatron_m3.memory.codecs import JOINT, VECTORS_PER_NUMBER, train_codec
from megatron_m3.memory.sensitivity import Sensitivity
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.memory.write import GROUP
from megatron_m3.ops.codec import vectors_needed

SMALL_BITS = 8
SECONDS = 0.3
"""Of coding, at least."""
MEANS_STEPS = 25
"""Passes over its vectors with which FAISS finds the entries of a codebook."""
MEANS_VECTORS = 256
"""Most vectors that it looks at for each of them."""
OPQ_STEPS, OPQ_VECTORS = 40 + 49 * 4, 65536
"""The same while FAISS finds OPQ's rotation, all in all."""


@dataclass(frozen=True, kw_only=True)
class CodecTime:
    """Of one rank: its training on one thread, its coding there or on the rank's device."""

    training_seconds: float
    vectors_per_second: float
    """Keys and values coded."""
    is_scaled: bool
    """Whether a smaller codec was timed."""


def measure_codec(settings: BankSettings, sample_vectors: int, device: torch.device = CPU) -> CodecTime:
    """Time the codec of a bank.

    Args:
        settings: of the bank.
        sample_vectors: keys that it will be trained on, and as many values; 0 where it is trained already.
        device: what it codes on.
    """
    if settings.codec == "none":
        return CodecTime(training_seconds=0.0, vectors_per_second=_rate(_train("none", settings, 16), settings, device),
                         is_scaled=False)
    size, small = settings.head_size, _small(settings.codec)
    lists, kept = int(settings.memory_lists.sum()), settings.num_kept_tokens
    tokens = VECTORS_PER_NUMBER * 2 * size if JOINT.fullmatch(small) else -(-vectors_needed(small) // lists)
    references = -(-tokens // kept)
    _train("SQ4", settings, 1)  # loads the library
    start = time.process_time()
    codec = _train(small, settings, references)
    seconds = time.process_time() - start
    timed = references * kept * lists
    work = _training_work(settings.codec, size, sample_vectors) / _training_work(small, size, timed)
    slower = _coding_work(settings.codec, size) / _coding_work(small, size)
    return CodecTime(training_seconds=seconds * work if sample_vectors else 0.0,
                     vectors_per_second=_rate(codec, settings, device) / slower, is_scaled=small != settings.codec)


def _small(name: str) -> str:
    """The codec that is timed."""
    parts = [part for part in name.split(",") if not part.startswith("OPQ")] or [name]
    return ",".join(re.sub(r"x(\d+)", lambda bits: f"x{min(int(bits[1]), SMALL_BITS)}", part) for part in parts)


def _train(name: str, settings: BankSettings, references: int) -> Codec:
    sample, size = _random(settings, references), settings.head_size
    held_LG = settings.memory_lists
    even = torch.eye(size).expand(*held_LG.shape, size, size)

    def sensitivity() -> Sensitivity:
        return Sensitivity(frequency=torch.zeros(size // 2, dtype=torch.float64), query_LGDD=even, value_LGDD=even)

    return train_codec(name, sample, held_LG=held_LG, dtype="bf16", sensitivity=sensitivity)


def _random(settings: BankSettings, references: int) -> ExplicitMemories:
    (layers, heads), kept = settings.memory_lists.shape, settings.num_kept_tokens
    generator = torch.Generator().manual_seed(0)
    return ExplicitMemories(
        kv=torch.randn(references, layers, 2, heads, kept, settings.head_size, generator=generator),
        positions=torch.arange(kept, dtype=torch.int16).expand(references, layers, heads, kept),
        num_kept=torch.full((references,), kept, dtype=torch.int32),
    )


def _rate(codec: Codec, settings: BankSettings, device: torch.device) -> float:
    """Vectors a second."""
    vectors = 2 * int(settings.memory_lists.sum()) * settings.num_kept_tokens
    is_cuda = device.type == "cuda"
    some = _random(settings, GROUP if is_cuda else max(1, 4096 // vectors)).to(device, torch.float32)
    codec, clock = codec.to(device), time.perf_counter if is_cuda else time.process_time
    codec.encode(some)
    count, start = 0, clock()
    while count == 0 or clock() - start < SECONDS:
        codec.encode(some)
        count += 1
    return vectors * len(some) * count / max(clock() - start, 1e-6)


def _coding_work(name: str, size: int) -> float:
    """Multiplications to code a vector of ``size`` numbers, as a product of codebooks takes them."""
    return sum(_parts(name, lambda entries: float(size * entries), lambda: float(size**2))) or 1.0


def _training_work(name: str, size: int, vectors: int) -> float:
    """Multiplications to train it."""
    return sum(_parts(name, lambda entries: float(MEANS_STEPS * min(vectors, MEANS_VECTORS * entries) * size * entries),
                      lambda: float(OPQ_STEPS * min(vectors, OPQ_VECTORS) * size * 256))) or float(vectors)


def _parts(name: str, codebook: Callable[[int], float], rotation: Callable[[], float]) -> list[float]:
    """What the parts of a FAISS factory string take: products of codebooks and rotations."""
    found = []
    for part in name.split(","):
        bits = re.search(r"x(\d+)", part)
        if part.startswith("OPQ"):
            found.append(rotation())
        elif bits or part.startswith("PQ"):
            found.append(codebook(2 ** int(bits[1]) if bits else 256))
    return found
