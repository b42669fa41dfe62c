"""Rotary position embedding, applied inside core attention so that selection sees queries and keys before it."""

import math
from typing import Self

import torch
from torch import Tensor

from megatron_m3.config import ModelConfig
from megatron_m3.ops.rope import Table, rotate, turns


class Rope:
    """Rotates pairs (i, i + D/2) of a head's D numbers by ``position * theta ** (-2i / D)``."""

    def __init__(self, head_size: int, theta: float) -> None:
        self.frequency = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """The rotation of a model, its change of frequencies included."""
        rope = cls(model.head_size, model.rope_theta)
        if model.rope_scaling == "llama3":
            turns = rope.frequency * model.rope_original_positions / (2 * math.pi)
            low, high = model.rope_low_frequency, model.rope_high_frequency
            # the share of a frequency that stays: 0 for low ones, 1 for high ones, linear in the turns between
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            rope.frequency = rope.frequency * (kept + (1 - kept) / model.rope_factor)
        return rope

    def table(self, positions: Tensor, dtype: torch.dtype) -> Table:
        """What :func:`rotate` takes, ``[*positions, 1, D]`` each, for vectors of ``dtype`` with heads after positions.

        They are in fp32 or wider: a bf16 table would rotate distant positions by visibly wrong angles.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        # kept there: a copy for each step of generation would wait for the device
        self.frequency = self.frequency.to(positions.device)
        angle = positions.to(torch.float64)[..., None, None] * self.frequency
        return turns(angle, dtype)

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[..., heads, D]`` vectors, whose leading axes broadcast with those of ``positions``."""
        return rotate(vectors, self.table(positions, vectors.dtype))
