"""Memory attention beside the library's plain causal attention, forward and backward, in one run.

    python -m tests.benchmarks.bench_attention [--record] [--tune]

On a CUDA device: every backend that can run there, at the shapes of m3-2b and SmolLM2, with 8 kept tokens and the
references of 5 chunks; the floor is torch's flash attention of the trunk alone (its key-value heads repeated beforehand
or by the kernel, whichever is faster). Without one: the torch backend beside the plain reference on one thread. Nothing
is timed before its output and gradients are checked. ``--record`` adds the rows to ``results.csv``; ``--tune`` times
the Triton kernels with other tiles than those of ``triton_tiles.py`` at m3-2b's shape.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention import get_backend, triton_backend, triton_tiles
from tests.benchmarks import results

LIMITED = {True: ("m3-2b", "triton"), False: ("smollm2", "torch")}
"""Shape and backend that the limit is for, on a CUDA device and without one."""
LIMIT = 1.10
"""Forward and backward of the triton backend against the floor."""
CPU_LIMIT = 3.0
"""Speed of the torch backend against the reference, on the CPU."""
ERROR = {torch.bfloat16: 0.03, torch.float32: 1e-5}
"""Largest difference from the reference, against the largest number of the result."""
AHEAD = 4_000_000
"""Cycles that a device waits before each round, in which the launches of the round are queued."""


@dataclass(frozen=True)
class Shape:
    """What is timed."""

    name: str
    batch: int
    context: int
    heads: int
    kv_heads: int
    head_size: int
    prefix: int = 4
    chunk: int = 64
    window: int = 5
    slots: int = 8


CUDA_SHAPES = [Shape("m3-2b", 1, 2048, 40, 8, 80), Shape("m3-2b", 4, 2048, 40, 8, 80),
               Shape("smollm2", 16, 512, 9, 3, 64)]
CPU_SHAPES = [Shape("smollm2", 1, 2048, 9, 3, 64)]


@dataclass(frozen=True)
class Inputs:
    """Trunk and memory, the mask, and a gradient of the output."""

    tensors: list[Tensor]
    valid: Tensor
    grad: Tensor
    shape: Shape

    @classmethod
    def of(cls, shape: Shape, device: str, dtype: torch.dtype) -> "Inputs":
        """Random inputs, all slots valid."""
        torch.manual_seed(0)
        B, T, C = shape.batch, shape.prefix + shape.context, shape.context // shape.chunk
        G, D = shape.kv_heads, shape.head_size
        sizes = [(B, T, shape.heads, D), *[(B, T, G, D)] * 2, *[(B, C, shape.slots, G, D)] * 2]
        tensors = [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]
        valid = torch.ones(B, C, shape.slots, dtype=torch.bool, device=device)
        return cls(tensors, valid, torch.randn(sizes[0], device=device).to(dtype), shape)

    def attend(self, backend: ModuleType) -> Tensor:
        """Memory attention by ``backend``."""
        return backend.memory_attention(*self.tensors, self.valid, prefix_length=self.shape.prefix,
                                        chunk_length=self.shape.chunk, window=self.shape.window)

    def results(self, backend: ModuleType) -> list[Tensor]:
        """Output and all gradients."""
        out = self.attend(backend)
        return [out, *torch.autograd.grad(out, self.tensors, self.grad)]


def check(inputs: Inputs, backend: ModuleType) -> None:
    """Stop where output or a gradient is not the reference's."""
    for result, truth in zip(inputs.results(backend), inputs.results(get_backend("reference")), strict=True):
        error = (result.float() - truth.float()).abs().max() / truth.float().abs().max()
        assert error < ERROR[truth.dtype], f"{backend.__name__}: error {error:.2e}"


def milliseconds(work: Callable[[], object], rounds: int = 50) -> tuple[float, float, float]:
    """Times at 20, 50 and 80 %, the second level of cache cleared before each round on a CUDA device."""
    cuda = torch.cuda.is_available()
    for _ in range(5 if cuda else 1):
        work()
    if not cuda:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        times = torch.tensor(seconds) * 1e3
    else:
        cache = torch.empty(2**26, dtype=torch.int32, device="cuda")
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for start, end in events:
            cache.zero_()
            torch.cuda._sleep(AHEAD)
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        times = torch.tensor([start.elapsed_time(end) for start, end in events])
    return results.spread(times)


def both_ways(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Iterator[tuple[str, tuple]]:
    """Times of the forward pass and of both passes."""
    with torch.no_grad():
        alone = milliseconds(forward)
    yield "forward", alone
    yield "forward+backward", milliseconds(lambda: torch.autograd.grad(forward(), leaves, grad))


def plain(inputs: Inputs, kind: SDPBackend, repeat: bool) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
    """The library's causal attention of the trunk, heads first; key-value heads repeated beforehand or inside."""
    times = inputs.shape.heads // inputs.shape.kv_heads if repeat else 1
    leaves = [inputs.tensors[0], *(tensor.repeat_interleave(times, 2) for tensor in inputs.tensors[1:3])]
    leaves = [tensor.detach().transpose(1, 2).requires_grad_() for tensor in leaves]

    def forward() -> Tensor:
        with sdpa_kernel(kind):
            return functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=not repeat)

    return forward, leaves, inputs.grad.transpose(1, 2)


def floors(inputs: Inputs) -> dict[str, dict[str, tuple]]:
    """Times of the library's kernels for the trunk alone; ``floor`` is the faster flash attention."""
    times: dict[str, dict[str, tuple]] = {}
    for name, kind in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        for repeat in (True, False):
            try:
                times[f"{name}, {'repeated' if repeat else 'grouped'}"] = dict(both_ways(*plain(inputs, kind, repeat)))
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
    flash = [found for name, found in times.items() if name.startswith("flash")]
    times["floor"] = {way: min((found[way] for found in flash), key=lambda time: time[1]) for way in flash[0]}
    return times


def rows(shape: Shape, broken: list[str]) -> Iterator[dict[str, object]]:
    """One row for every kernel and direction; backends that fail are not timed, and are added to ``broken``."""
    cuda = torch.cuda.is_available()
    inputs = Inputs.of(shape, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    reference = get_backend("reference")
    backends = {name: get_backend(name) for name in (("torch", "triton", "te") if cuda else ("torch",))}
    for name, backend in list(backends.items()):
        try:
            check(inputs, backend)
        except UnsupportedError as error:
            print(error, file=sys.stderr)
            del backends[name]
        except Exception as error:  # whatever it is, the others are timed
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            broken.append(name)
            del backends[name]
    times = floors(inputs) if cuda else {
        "floor": dict(both_ways(functools.partial(inputs.attend, reference), inputs.tensors, inputs.grad))}
    for name, backend in backends.items():
        times[name] = dict(both_ways(functools.partial(inputs.attend, backend), inputs.tensors, inputs.grad))
    for name, found in times.items():
        for way, (low, middle, high) in found.items():
            yield {"shape": shape.name, "batch": shape.batch, "tokens": shape.context, "what": name, "pass": way,
                   "p20_ms": round(low, 4), "p50_ms": round(middle, 4), "p80_ms": round(high, 4),
                   "ratio": round(middle / times["floor"][way][1], 3)}


T = triton_tiles.Tile
CANDIDATES = {
    "forward": [T(128, 64, 64, 8, 3, 128), T(128, 64, 64, 8, 2, 128), T(128, 64, 64, 8, 3), T(128, 64, 64, 4, 3),
                T(128, 64, 64, 4, 2), T(64, 64, 64, 4, 3, 168), T(64, 64, 64, 4, 2, 168), T(64, 64, 64, 4, 3),
                T(128, 128, 64, 8, 2), T(128, 128, 64, 8, 3), T(128, 32, 64, 4, 4), T(64, 128, 64, 4, 2)],
    "query": [T(64, 64, 64, 4, 2), T(64, 64, 64, 4, 3), T(64, 64, 64, 4, 2, 168), T(128, 64, 64, 8, 2),
              T(128, 64, 64, 8, 3), T(128, 64, 64, 8, 2, 128), T(128, 64, 32, 8, 2), T(128, 128, 64, 8, 2),
              T(64, 128, 64, 4, 2), T(64, 32, 64, 4, 3, 168), T(128, 32, 64, 4, 3)],
    "key": [T(64, 128, 64, 8, 2), T(64, 128, 64, 8, 3), T(64, 64, 64, 4, 2), T(64, 64, 64, 4, 3), T(64, 64, 64, 8, 2),
            T(32, 64, 64, 4, 2), T(32, 64, 64, 4, 3), T(32, 64, 64, 4, 3, 168), T(32, 128, 64, 8, 3),
            T(32, 128, 64, 8, 2, 128), T(128, 128, 64, 8, 2), T(32, 128, 64, 4, 2)],
}


def tune(shape: Shape) -> None:
    """Print both passes' time with each tile of each kernel, the other kernels keeping theirs."""
    inputs = Inputs.of(shape, "cuda", torch.bfloat16)
    major, minor = torch.cuda.get_device_capability()
    table = triton_tiles.tiles_for(torch.bfloat16, 10 * major + minor)
    for kernel, candidates in CANDIDATES.items():
        place = triton_tiles.place_of(table, kernel, shape.head_size)
        kept = table[place]
        for tile in candidates:
            table[place] = tile
            try:
                check(inputs, triton_backend)
                times = dict(both_ways(functools.partial(inputs.attend, triton_backend), inputs.tensors, inputs.grad))
                report = ", ".join(f"{way} {time[1]:.4f} ms" for way, time in times.items())
            except AssertionError:  # a wrong result
                raise
            except Exception as error:  # a tile that does not fit the card, in Triton's words
                report = str(error).partition("\n")[0][:100]
            mark = " (kept)" if tile == kept else ""
            print(f"{shape.name} x {shape.batch} {kernel} {tile}: {report}{mark}", flush=True)
        table[place] = kept
    few_programs = triton_backend.FEW_PROGRAMS
    for few in (0, 10**9):
        triton_backend.FEW_PROGRAMS = few
        times = dict(both_ways(functools.partial(inputs.attend, triton_backend), inputs.tensors, inputs.grad))
        print(f"{shape.name} x {shape.batch} heads summed {'afterwards' if few else 'in a program'}: "
              f"{times['forward+backward'][1]:.4f} ms", flush=True)
    triton_backend.FEW_PROGRAMS = few_programs


def main() -> None:
    """Print times, ratios to the floor, and whether the limit is kept; exit with 1 where it is not."""
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    if not cuda and len(sys.argv) > 1:
        sys.exit("error: --record and --tune need a CUDA device")
    if "--tune" in sys.argv:
        for shape in CUDA_SHAPES[:2]:
            tune(shape)
        return
    met, broken, (name, backend) = True, list[str](), LIMITED[cuda]
    for shape in CUDA_SHAPES if cuda else CPU_SHAPES:
        limits = {("forward+backward", backend): LIMIT if cuda else 1 / CPU_LIMIT} if shape.name == name else {}
        met &= results.report("attention", list(rows(shape, broken)), limits)
    sys.exit(not met or bool(broken))


if __name__ == "__main__":
    main()
