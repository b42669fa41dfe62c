"""Compile the kernels for cards that are not here, and read off what they use.

    python -m tests.unit.ops.compiled_kernels
"""

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_m3.ops.cached_attention import triton_backend as triton_cached
from megatron_m3.ops.codec import triton_decode, triton_trellis
from megatron_m3.ops.memory_attention import triton_backend, triton_tiles
from megatron_m3.ops.rope import triton_backend as triton_rope
from megatron_m3.ops.select_tokens import triton_backend as triton_select

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most bytes of shared memory of a program, by architecture."""
KERNELS = {"forward": "forward_kernel", "query": "query_gradient_kernel", "key": "key_gradient_kernel"}
ALL_SHAPES = [*itertools.product(KERNELS, [32, 64, 80, 96, 128, 192, 256], [torch.bfloat16], SHARED_MEMORY),
              *itertools.product(KERNELS, [64, 80, 128, 256], [torch.float32], SHARED_MEMORY)]
SHAPES = [*itertools.product(KERNELS, [64, 80], [torch.bfloat16], SHARED_MEMORY),
          *itertools.product(KERNELS, [128], [torch.bfloat16], [90])]
"""What the tests compile: the shapes of m3-0.9b, SmolLM2 and m3-2b, and the usual one."""
OTHER_SHAPES = [
    *itertools.product(["search"], [0], [torch.float32], [90, 100]),
    *itertools.product(["decode", "weights", "rotate", "attend"], [80], [torch.bfloat16], SHARED_MEMORY),
    *[("long weights", 80, torch.bfloat16, 90), ("statistics", 80, torch.bfloat16, 90)],
    ("exp weights", 80, torch.bfloat16, 100), ("join", 80, torch.bfloat16, 90)]
ALL_OTHER_SHAPES = [
    *itertools.product(["search"], [0], [torch.float32], SHARED_MEMORY),
    *itertools.product(["decode", "rotate"], [32, 64, 80, 128, 256], [torch.bfloat16], SHARED_MEMORY),
    *itertools.product(["weights", "long weights", "exp weights", "statistics", "attend", "join"],
                       [32, 64, 80, 96, 128, 192, 256], [torch.bfloat16, torch.float32], SHARED_MEMORY)]
"""Kernels of the codec, of selection, of RoPE and of attention to a cache; the first are what the tests compile."""
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


def compile_kernel(kernel: str, head_size: int, dtype: torch.dtype, architecture: int,
                   tile: triton_tiles.Tile | None = None) -> Use:
    """Compile one kernel of attention with memory, as m3-2b's heads use it, for ``architecture`` (90 is H100)."""
    tiles = triton_tiles.tiles_for(dtype, architecture)
    tile = tile or tiles[triton_tiles.place_of(tiles, kernel, head_size)]
    constants = triton_backend.constants(tile, head_size, repeat=5, slots=8)
    if kernel == "key":
        constants["EACH"] = 5
    integers = dict.fromkeys(["T", "heads", "prefix", "chunk_length", "chunks", "window", "slots"], "i32")
    types = integers | {"valid": "*u8", "lse": "*fp32", "dots": "*fp32", "scale": "fp32", "scale2": "fp32"}
    function = getattr(triton_backend.kernels(), KERNELS[kernel])
    return compile_function(function, constants, types, f"*{NAMES[dtype]}", architecture)


def compile_other(kernel: str, head_size: int, dtype: torch.dtype, architecture: int) -> Use:
    """Compile a kernel that is not of attention with memory, for heads like m3-2b's."""
    if kernel == "search":
        types = {"states": "*i16", **dict.fromkeys(["runs", "bits", "choices"], "*i32"), "length": "i32",
                 "num_runs": "i32"}
        function, constants = triton_trellis.kernels().search_kernel, triton_trellis.launch_options()
        return compile_function(function, constants, types, "*fp32", architecture)
    if kernel == "decode":
        types = dict.fromkeys(["code_stride", "tokens", "numbers", "num_positions"], "i32")
        types |= dict.fromkeys(["num_kept", "placements", "classes", "fields"], "*i32")
        types |= {"position_strides": ("i32",) * 2, "out_strides": ("i32",) * 5}
        types |= {"codes": "*u8", "positions": "*i16", "out": f"*{NAMES[dtype]}"}
        function, constants = triton_decode.kernels().decode_kernel, triton_decode.launch_options(head_size, 8)
        return compile_function(function, constants, types, "*fp32", architecture)
    if kernel == "rotate":
        types = {"cosine": "*fp32", "sine": "*fp32", "table_strides": ("i32",) * 2, "batch": "i32", "heads": "i32"}
        function, constants = triton_rope.kernels().rotate_kernel, triton_rope.launch_options(40, head_size)
        return compile_function(function, constants | {"BACKWARD": True}, types, f"*{NAMES[dtype]}", architecture)
    if kernel == "join":
        function, constants = triton_cached.kernels().join_kernel, triton_cached.join_options(head_size, 5, 16)
        return compile_function(function, constants, {"out": f"*{NAMES[dtype]}"}, "*fp32", architecture)
    if kernel == "attend":
        types = dict.fromkeys(["table_stride", "mask_stride", "groups", "prefix", "slots"], "i32")
        types |= {f"{name}_strides": ("i32",) * 2 for name in ("query", "key", "value")}
        types |= dict.fromkeys(["cosine", "sine", "out", "most_of", "total_of"], "*fp32")
        types |= {"lengths": "*i64", "hidden": "*u8", "scale2": "fp32"}
        function = triton_cached.kernels().attend_kernel
        constants = triton_cached.launch_options(dtype, head_size, 5, 16, heads=True)
        return compile_function(function, constants, types, f"*{NAMES[dtype]}", architecture)
    tile = triton_select.tile_for(dtype, "exp" if kernel == "exp weights" else "softmax")
    constants = triton_select.constants(tile, head_size, repeat=5)
    if kernel != "statistics":
        constants |= {"WHOLE": kernel == "weights", "EXP": kernel == "exp weights"}
    types = dict.fromkeys(["T", "heads", "groups"], "i32") | {"scale2": "fp32"}
    types |= {"lengths": "*i64", "lse": "*fp32", "weights": "*fp32"}
    function = getattr(triton_select.kernels(), f"{kernel.split()[-1]}_kernel")
    return compile_function(function, constants, types, f"*{NAMES[dtype]}", architecture)


def compile_function(
    function: Any, constants: dict[str, Any], types: dict[str, Any], default: str, architecture: int
) -> Use:
    """Compile a kernel: ``types`` of its arguments by name, the ``default`` for pointers, 3 strides for ``_strides``.

    Pointers and strides are multiples of 16, as torch's are; what is left of ``constants`` are options.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options, signature, fixed, aligned = dict(constants), {}, {}, {}
    for number, name in enumerate(function.arg_names):
        if name in options:
            signature[name], fixed[number,] = "constexpr", options.pop(name)
            continue
        signature[name] = types.get(name, ("i32",) * 3 if name.endswith("_strides") else default)
        if isinstance(signature[name], tuple):
            aligned |= {(number, axis): [["tt.divisibility", 16]] for axis in range(len(signature[name]))}
        elif signature[name].startswith("*"):
            aligned[number,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = resources(compiled.asm["cubin"])
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Use(registers, spilled, compiled.metadata.shared, columns)


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
    """Print the tables."""
    print("| kernel | head size | dtype | sm | tile (rows × keys, slots) | warps | registers | spilled | shared KiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kernel, head_size, dtype, architecture in ALL_SHAPES:
        use = compile_kernel(kernel, head_size, dtype, architecture)
        tiles = triton_tiles.tiles_for(dtype, architecture)
        tile = tiles[triton_tiles.place_of(tiles, kernel, head_size)]
        print(f"| {kernel} | {head_size} | {NAMES[dtype]} | {architecture} | {tile.rows} × {tile.keys}, {tile.slots} | "
              f"{tile.warps} | {use.registers} | {use.spilled_bytes} | {use.shared_bytes / 1024:.0f} |", flush=True)
    print("\n| kernel | head size | dtype | sm | registers | spilled | shared KiB |\n|---|---|---|---|---|---|---|")
    for kernel, head_size, dtype, architecture in ALL_OTHER_SHAPES:
        use = compile_other(kernel, head_size, dtype, architecture)
        print(f"| {kernel} | {head_size or ''} | {NAMES[dtype]} | {architecture} | {use.registers} | "
              f"{use.spilled_bytes} | {use.shared_bytes / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
