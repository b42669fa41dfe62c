"""Kernels that write and read memories, each beside its floor, in one run on a CUDA device.

    python -m tests.benchmarks.bench_kernels [--record]

At m3-2b's shape: selection of a layer's tokens beside that layer's attention in the references, forward and backward;
decoding of KLT28 into the slots of a cache beside a copy of the same bytes; the search of KLT28's encoder, one head's
codes, beside the same search by torch operations; RoPE of a joint sequence's queries, forward and backward, by each
backend beside two copies; and a new token's attention to the caches of 32 sequences, its rotation and writes included,
by each backend beside a copy of half of the cache. ``--record`` adds the rows to ``results.csv``.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tests.benchmarks import results
from tests.benchmarks.bench_attention import milliseconds

SELECT_LIMIT = 0.10
"""Time of selection against attention in the references."""


@dataclass(frozen=True)
class Shape:
    """What is timed."""

    name: str = "m3-2b"
    references: int = 128
    tokens: int = 128
    heads: int = 40
    kv_heads: int = 8
    head_size: int = 80
    layers: int = 22
    kept: int = 8
    coded: int = 112
    """Numbers of a key and value that have 2 bits: KLT28."""


def select_works(shape: Shape, device: str) -> tuple[str, dict[str, Callable[[], object]]]:
    """Attention in references, and selection by each backend."""
    from megatron_m3.ops.memory_attention import get_backend
    from megatron_m3.ops.select_tokens import select_tokens

    dtype, attend = torch.bfloat16, get_backend("triton").reference_attention
    query, key, value = (torch.randn(shape.references, shape.tokens, heads, shape.head_size, device=device, dtype=dtype,
                                     requires_grad=True) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    prefix = torch.randn(2, shape.references, 4, shape.kv_heads, shape.head_size, device=device, dtype=dtype)
    lengths, grad = torch.full((shape.references,), shape.tokens, device=device), torch.randn_like(query)
    works: dict[str, Callable[[], object]] = {
        "floor": lambda: torch.autograd.grad(attend(query, key, value, *prefix), (query, key, value), grad)}
    for backend in ("torch", "triton"):
        works[backend] = lambda backend=backend: select_tokens(query, key, lengths, shape.kept, backend=backend)
    return "select", works


def decode_works(shape: Shape, device: str) -> tuple[str, dict[str, Callable[[], object]]]:
    """A copy of keys and values, and their decoding."""
    from megatron_m3.ops.codec import trellis
    from megatron_m3.ops.codec.transform import TransformCode
    from megatron_m3.ops.codec.triton_decode import SlotDecoder

    held, size = torch.ones(shape.layers, shape.kv_heads, dtype=torch.bool), 2 * shape.head_size
    count, square = int(held.sum()), torch.randn(held.numel(), size, size)
    bits = 2 * (torch.arange(size) < shape.coded).expand(count, -1)
    code = TransformCode(held.nonzero()[:, 1], torch.randn(count, size), square, square, bits.to(torch.uint8),
                         torch.ones(count, size), trellis.start_tables())
    decoder = SlotDecoder(code, torch.ones(shape.head_size // 2).double(), held, slice(None), shape.tokens, device)
    codes = torch.randint(0, 256, (shape.references, count * shape.kept * shape.coded // 4), dtype=torch.uint8)
    positions = torch.randint(0, shape.tokens, (shape.references, count, shape.kept), dtype=torch.int16)
    records = [part.to(device) for part in (codes, positions, torch.full((shape.references,), shape.kept))]
    place = torch.arange(shape.references)
    placements = torch.stack([place, place // 4, place % 4 * shape.kept], 1).int().to(device)
    out = torch.empty(shape.layers, 2, -(-shape.references // 4), shape.kv_heads, 4 * shape.kept, shape.head_size,
                      device=device, dtype=torch.bfloat16)
    other = torch.empty_like(out)
    return "decode", {"floor": lambda: other.copy_(out), "triton": lambda: decoder.decode(*records, placements, out)}


def search_works(shape: Shape, device: str) -> tuple[str, dict[str, Callable[[], object]]]:
    """The search for one head's codes, by torch operations and by the kernel."""
    from megatron_m3.ops.codec import trellis, triton_trellis

    bits = [2] * (shape.layers * shape.coded)
    tables = (100 * trellis.start_tables()[torch.tensor(bits)]).round().to(device)
    numbers = (100 * torch.randn(len(bits), shape.references * shape.kept, device=device)).round()

    def plain() -> None:
        for part in numbers.split(trellis.CHUNK, dim=1):
            trellis.search_plainly(part.contiguous(), tables, bits)

    return "search", {"floor": plain, "triton": lambda: triton_trellis.search(numbers, tables, bits)}


def rope_works(shape: Shape, device: str) -> tuple[str, dict[str, Callable[[], object]]]:
    """Two copies of the queries of 32 references and 2,048 tokens, and their rotation by each backend."""
    from megatron_m3.model.rope import Rope
    from megatron_m3.ops.rope import rotate

    length = 32 * shape.tokens + 2048
    query = torch.randn(length, 1, shape.heads, shape.head_size, device=device, dtype=torch.bfloat16,
                        requires_grad=True)
    table = Rope(shape.head_size, 1e4).table(torch.arange(length, device=device)[:, None], query.dtype)
    grad, other = torch.randn_like(query), torch.empty_like(query)

    def copy() -> None:
        with torch.no_grad():
            other.copy_(query)
            other.copy_(grad)

    def work(backend: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(rotate(query, table, backend), query, grad)

    return "rope", {"floor": copy, "torch": work("torch"), "triton": work("triton")}


def cache_works(shape: Shape, device: str) -> tuple[str, dict[str, Callable[[], object]]]:
    """As many bytes read and written as the attention reads, and the attention of a memory layer by each backend."""
    from megatron_m3.inference.cache import CachePlan, CacheShape
    from megatron_m3.model.rope import Rope

    batch, slots, context, works = 32, 5 * shape.kept, 512, {}
    given = [torch.randn(1, batch, heads, shape.head_size, device=device, dtype=torch.bfloat16)
             for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    for backend in ("torch", "triton"):
        cache = CachePlan(CacheShape(
            batch=batch, num_layers=1, num_kv_heads=shape.kv_heads, head_size=shape.head_size, prefix_length=4,
            context_start=4 + shape.tokens, max_context=context, memory_layers=[0], num_slots=slots,
            dtype=torch.bfloat16, device=torch.device(device)), Rope(shape.head_size, 1e4), backend)
        cache.mask_BT[:, 4 : 4 + slots] = 0
        cache.begin([context - 1 - row % 8 for row in range(batch)])
        cache.step()
        works[backend] = lambda cache=cache: cache.attend(0, *given)
    half, other = cache.keys[0], torch.empty_like(cache.keys[0])
    return "cache", {"floor": lambda: other.copy_(half), **works}


def rows(shape: Shape, device: str) -> Iterator[dict[str, object]]:
    """A row for each work."""
    torch.manual_seed(0)
    for make in (select_works, decode_works, search_works, rope_works, cache_works):
        name, works = make(shape, device)
        times = {what: milliseconds(work, 5 if name == "search" else 50) for what, work in works.items()}
        for what, (low, middle, high) in times.items():
            yield {"shape": shape.name, "batch": shape.references, "tokens": shape.tokens, "what": what, "pass": name,
                   "p20_ms": round(low, 4), "p50_ms": round(middle, 4), "p80_ms": round(high, 4),
                   "ratio": round(middle / times["floor"][1], 3)}


def main() -> None:
    """Print times and ratios to the floors; exit with 1 where the limit is missed."""
    if not torch.cuda.is_available():
        print("these kernels are timed on a CUDA device; there is none")
        return
    sys.exit(not results.report("kernels", list(rows(Shape(), "cuda")), {("select", "triton"): SELECT_LIMIT}))


if __name__ == "__main__":
    main()
