"""Compile the attention kernels for cards that are not here, and read off what they use.

    python -m tests.unit.ops.compiled_kernels
"""

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_m3.ops.memory_attention import triton_backend, triton_tiles

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most bytes of shared memory of a program, by architecture."""
KERNELS = {"forward": "forward_kernel", "query": "query_gradient_kernel", "key": "key_gradient_kernel"}
ALL_SHAPES = [*itertools.product(KERNELS, [32, 64, 80, 96, 128, 192, 256], [torch.bfloat16], SHARED_MEMORY),
              *itertools.product(KERNELS, [64, 80, 128, 256], [torch.float32], SHARED_MEMORY)]
SHAPES = [*itertools.product(KERNELS, [64, 80], [torch.bfloat16], SHARED_MEMORY),
          *itertools.product(KERNELS, [128], [torch.bfloat16], [90])]
"""What the tests compile: the shapes of m3-0.9b, SmolLM2 and m3-2b, and the usual one."""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Use:
    """What a program of a compiled kernel takes."""

    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread, for registers that it lacks."""
    shared_bytes: int
    """Shared memory."""
    tensor_columns: int
    """Tensor memory, which sm_100 has 512 columns of."""
    tile: triton_tiles.Tile
    """How its work is divided."""


def compile_kernel(kernel: str, head_size: int, dtype: torch.dtype, architecture: int,
                   tile: triton_tiles.Tile | None = None) -> Use:
    """Compile one kernel with memory, as m3-2b's heads use it, for ``architecture`` (90 is H100)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(triton_backend.kernels(), KERNELS[kernel])
    tiles = triton_tiles.tiles_for(dtype, architecture)
    tile = tile or tiles[triton_tiles.place_of(tiles, kernel, head_size)]
    constants = triton_backend.constants(tile, head_size, repeat=5, slots=8)
    if kernel == "key":
        constants["EACH"] = 5
    signature, fixed, aligned = {}, {}, {}
    for number, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], fixed[number,] = "constexpr", constants.pop(name)
        elif name.endswith("_strides"):
            signature[name] = ("i32",) * 3
            aligned |= {(number, axis): [["tt.divisibility", 16]] for axis in range(3)}
        elif name.startswith("scale"):
            signature[name] = "fp32"
        elif name in ("T", "heads", "prefix", "chunk_length", "chunks", "window", "slots"):
            signature[name] = "i32"
        else:
            signature[name] = {"valid": "*u8", "lse": "*fp32", "dots": "*fp32"}.get(name, f"*{NAMES[dtype]}")
            aligned[number,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=constants)
    registers, spilled = resources(compiled.asm["cubin"])
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Use(registers, spilled, compiled.metadata.shared, columns, tile)


def resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spills: the kernels have no arrays) of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> None:
    """Print the table."""
    print("| kernel | head size | dtype | sm | tile (rows × keys, slots) | warps | registers | spilled | shared KiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kernel, head_size, dtype, architecture in ALL_SHAPES:
        use = compile_kernel(kernel, head_size, dtype, architecture)
        tile = use.tile
        print(f"| {kernel} | {head_size} | {NAMES[dtype]} | {architecture} | {tile.rows} × {tile.keys}, {tile.slots} | "
              f"{tile.warps} | {use.registers} | {use.spilled_bytes} | {use.shared_bytes / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
