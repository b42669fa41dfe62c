"""Weights that are NaN or infinite: they are copied as they are, and it is said which."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m3.errors import warn

if TYPE_CHECKING:
    import torch

NAMED = 3
"""Most tensors that are named."""


def is_finite(data: "torch.Tensor") -> bool:
    """Whether all numbers are."""
    least, most = data.aminmax()
    return bool(least.isfinite() & most.isfinite())


def warn_of_broken(made: Path, names: Sequence[str]) -> None:
    """Say which tensors of what was ``made`` hold numbers that are not finite; a name may come several times."""
    names = list(dict.fromkeys(names))
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        warn(f"{made}: {', '.join(names[:NAMED])}{more} hold NaN or infinite numbers, as in the source; nothing can be "
             "computed with them: take another model")
