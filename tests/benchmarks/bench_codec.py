"""Vectors coded and decoded a second: our product code beside FAISS and beside a large matrix product, in one run.

    python -m tests.benchmarks.bench_codec
    python -m tests.benchmarks.bench_codec --checkpoint run --references references

The codec is the default construction, OPQ{D/4}_{D},Residual2x14,PQ8x10, for D = 80 and 64. Vectors are keys of the
checkpoint where one is given, else Gaussian numbers with as uneven a spectrum. Codebooks come of a few rounds of
k-means on 65,536 vectors, since what is timed does not depend on how good they are; the vectors timed are others.

Rates are by CPU seconds of all threads, the best of some rounds that take turns, so that other processes on the machine
count less than in wall time. ``share`` is that of the rate of an fp32 product of 2048 x 2048 matrices that a search
through all distances in fp32 would reach at the encoder's rate; ``differ`` the share of codes that are not FAISS's.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_m3.config import parse
from megatron_m3.platform import select

COUNT, TRAINED_ON, COPIES, ROUNDS = 4096, 1 << 16, 8, 5
THREADS = (1, 2)
AIM = {"encode": 4.0, "decode": 1.0}
"""Least speed against FAISS."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is coded."""

    checkpoint: str = ""
    """Run folder of a model whose keys are coded, beside Gaussian vectors."""
    references: str = ""
    """Folder of the references that it reads."""
    num_references: int = 200
    """How many of them."""


def gaussian(head_size: int) -> np.ndarray:
    """Vectors whose numbers are correlated, the largest spread 20 times the smallest."""
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(head_size, head_size)))[0]
    numbers = generator.normal(size=(TRAINED_ON + COUNT, head_size)) * np.geomspace(20, 1, head_size)
    return (numbers @ turn).astype(np.float32)


def real_keys(options: Options) -> np.ndarray:
    """Kept keys of references, in a random order."""
    from megatron_m3.memory import encode_references
    from megatron_m3.memory.types import held_lists
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.references import ReferenceStore

    loaded, store = load_model(Path(options.checkpoint)), ReferenceStore.open(options.references)
    generator = np.random.default_rng(0)
    ids = generator.choice(len(store), min(options.num_references, len(store)), replace=False)
    held_LG = held_lists(loaded.config.memory_heads, loaded.config.model.num_kv_heads)
    keys = encode_references(loaded, *store.tokens(np.sort(ids))).vectors(0, held_LG)
    return keys[generator.permutation(len(keys))[: TRAINED_ON + COUNT]]


def train(vectors: np.ndarray) -> Any:
    """The default construction, roughly trained."""
    import faiss

    from megatron_m3.ops.codec.reference import make_index

    size = vectors.shape[1]
    index = make_index(f"OPQ{size // 4}_{size},Residual2x14,PQ8x10", size)
    layers: Any = faiss.downcast_index(index.index)
    coarse: Any = faiss.downcast_index(layers.q1.quantizer)
    turn: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    turn.niter = coarse.pq.cp.niter = layers.pq.cp.niter = 2
    index.train(vectors[:-COUNT])
    return index


def best(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Fewest CPU seconds of each work; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return {name: min(times) for name, times in seconds.items()}


def flops(head_size: int) -> int:
    """Operations for all distances of one vector, and its rotation."""
    return 2 * head_size * (head_size + (1 << 14) + (1 << 10))


def bench(name: str, vectors: np.ndarray, index: Any, threads: int) -> bool:
    """Print the figures of one case; whether the aims are met."""
    import faiss
    import torch

    from megatron_m3.ops.codec import FaissVectors

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    codec, size, few = FaissVectors(index), vectors.shape[1], np.ascontiguousarray(vectors[-COUNT:])
    theirs = index.sa_encode(few)
    differ = (codec.encode(few) != theirs).any(1).mean()
    codes = np.concatenate([theirs] * COPIES)
    out = {dtype: torch.empty(len(codes), size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    square = torch.ones(2048, 2048)
    times = best({
        "product": lambda: torch.mm(square, square), "faiss encode": lambda: index.sa_encode(few),
        "encode": lambda: codec.encode(few), "faiss decode": lambda: index.sa_decode(codes),
        "decode": lambda: codec.decode_into(codes, out[torch.float32]),
        "decode bf16": lambda: codec.decode_into(codes, out[torch.bfloat16]),
    })
    rate = 2 * 2048**3 / times["product"]
    speed = {way: times[f"faiss {way}"] / times[way] for way in ("encode", "decode")}
    coded = {way: (COUNT if "encode" in way else len(codes)) / seconds for way, seconds in times.items()}
    for way in ("encode", "decode"):
        print(f"{name:<12}D={size} threads={threads} {way} {coded[way]:>11,.0f} FAISS {coded[f'faiss {way}']:>11,.0f} "
              f"ratio {speed[way]:6.2f} aim {AIM[way]}", flush=True)
    print(f"{name:<12}D={size} threads={threads} decode to bf16 {coded['decode bf16']:,.0f}; fp32 product "
          f"{rate / 1e9:.0f} GFLOP, share {coded['encode'] * flops(size) / rate:.2f}; differ {differ:.5f}", flush=True)
    return all(speed[way] >= aim for way, aim in AIM.items())


def main() -> None:
    """Print a line for each case; exit with 1 where an aim is missed."""
    options = parse(Options, None, "bench_codec", __doc__ or "")
    select()
    cases = {"gaussian 80": gaussian(80)}
    if options.checkpoint:
        cases["keys"] = real_keys(options)
    else:
        cases["gaussian 64"] = gaussian(64)
    met = []
    for name, vectors in cases.items():
        index = train(vectors)
        met += [bench(name, vectors, index, threads) for threads in THREADS]
    sys.exit(not all(met))


if __name__ == "__main__":
    main()
