"""How the Triton kernels divide their work, by kernel, head size, dtype and card.

Chosen so that no kernel spills registers; ``tests/unit/ops/compiled_kernels.py`` prints what each uses.
"""

from dataclasses import dataclass

import torch

from megatron_m3.errors import UnsupportedError


@dataclass(frozen=True)
class Tile:
    """How a kernel divides its work."""

    rows: int
    """Queries of a block."""
    keys: int
    """Keys of a block."""
    slots: int
    """Memory slots of a block."""
    warps: int
    """Warps of a program."""
    stages: int
    """Blocks in flight."""
    registers: int | None = None
    """Most registers of a thread, where fewer let more programs run at once."""


Tiles = dict[tuple[str, int], Tile]

HOPPER: Tiles = {
    ("forward", 80): Tile(128, 64, 64, 8, 3, 128),
    ("forward", 128): Tile(128, 64, 64, 8, 3),
    ("forward", 192): Tile(128, 64, 64, 8, 2),
    ("forward", 256): Tile(128, 64, 32, 8, 2),
    ("query", 80): Tile(64, 64, 64, 4, 2),
    ("query", 128): Tile(128, 64, 64, 8, 2),
    ("query", 192): Tile(128, 64, 32, 8, 2),
    ("query", 256): Tile(32, 32, 32, 4, 2),
    ("key", 96): Tile(64, 128, 64, 8, 2),
    ("key", 128): Tile(32, 128, 64, 8, 2),
    ("key", 192): Tile(32, 64, 64, 8, 2),
    ("key", 256): Tile(32, 64, 32, 8, 1),
}
"""16-bit inputs on sm_90, by kernel and largest head size."""

BLACKWELL: Tiles = {
    ("forward", 192): Tile(128, 64, 64, 8, 2),
    ("forward", 256): Tile(64, 64, 64, 8, 2),
    ("query", 128): Tile(128, 64, 64, 8, 2),
    ("query", 192): Tile(64, 64, 32, 8, 2),
    ("query", 256): Tile(64, 64, 32, 8, 1),
    ("key", 128): Tile(64, 128, 64, 8, 2),
    ("key", 192): Tile(32, 64, 64, 8, 2),
    ("key", 256): Tile(32, 64, 64, 8, 1),
}
"""16-bit inputs on sm_100."""

AMPERE: Tiles = {
    ("forward", 96): Tile(128, 64, 64, 8, 2),
    ("forward", 128): Tile(128, 64, 32, 8, 2),
    ("forward", 192): Tile(32, 32, 32, 4, 2),
    ("forward", 256): Tile(64, 64, 64, 8, 2),
    ("query", 64): Tile(128, 64, 32, 8, 2),
    ("query", 96): Tile(64, 32, 32, 8, 2),
    ("query", 128): Tile(64, 64, 32, 8, 2),
    ("query", 256): Tile(32, 32, 32, 4, 2),
    ("key", 64): Tile(64, 128, 64, 8, 2),
    ("key", 80): Tile(32, 64, 64, 8, 2),
    ("key", 96): Tile(32, 64, 32, 8, 1),
    ("key", 128): Tile(64, 64, 64, 8, 2),
    ("key", 192): Tile(32, 32, 32, 4, 1),
    ("key", 256): Tile(32, 64, 32, 8, 1),
}
"""16-bit inputs on sm_80."""

WIDE: Tiles = {
    ("forward", 80): Tile(32, 32, 32, 8, 2),
    ("forward", 256): Tile(32, 16, 16, 8, 1),
    ("query", 80): Tile(32, 16, 16, 8, 1),
    ("query", 256): Tile(16, 16, 16, 8, 1),
    ("key", 256): Tile(32, 32, 32, 8, 1),
}
"""fp32 inputs, whose products do not run on tensor cores."""


def tiles_for(dtype: torch.dtype, architecture: int) -> Tiles:
    """The tiles for inputs of ``dtype`` on a card of ``architecture`` (90 is H100).

    Raises:
        UnsupportedError: a card whose programs have less shared memory than these tiles take.
    """
    if architecture not in (80, 90, 100, 103):
        raise UnsupportedError(
            f"model.attention=triton: no tiles for sm_{architecture}; there are some for sm_80, sm_90 and sm_100: "
            "use torch"
        )
    if dtype == torch.float32:
        return WIDE
    if architecture < 90:
        return AMPERE
    return HOPPER if architecture < 100 else BLACKWELL


def place_of(tiles: Tiles, kernel: str, head_size: int) -> tuple[str, int]:
    """Where the tile of ``kernel`` (forward, query or key) stands."""
    return kernel, min(size for name, size in tiles if name == kernel and size >= head_size)
