"""Explicit memories as numbers in RAM.

Letters: N references, L memory layers, X key or value (0 is the key), G key-value heads, K kept tokens, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def held_lists(memory_heads: Mapping[int, Sequence[int]], num_heads: int) -> Tensor:
    """Which of ``num_heads`` heads hold memory in which memory layer, bool [L, G], from those of each layer."""
    return torch.tensor([[head in heads for head in range(num_heads)] for _, heads in sorted(memory_heads.items())])


@dataclass(frozen=True, kw_only=True)
class ExplicitMemories:
    """Explicit memories of N references; all but ``kv`` are on the CPU."""

    kv: Tensor
    """[N, L, 2, G, K, D], float32 on the CPU unless asked for otherwise: keys after RoPE and values of the kept tokens;
    0 where there is no kept token."""
    positions: Tensor
    """int16 [N, L, G, K]: place of each kept token in its reference, ascending; 0 where there is none."""
    num_kept: Tensor
    """int32 [N]: tokens kept of each reference; the slots from there on hold nothing and are never read."""

    def __len__(self) -> int:
        return len(self.num_kept)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> "ExplicitMemories":
        """The memories of some rows."""
        return ExplicitMemories(kv=self.kv[rows], positions=self.positions[rows], num_kept=self.num_kept[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ExplicitMemories":
        """The same with ``kv`` on ``device`` as ``dtype``; to a GPU it is copied behind what the CPU does next."""
        device, kv = torch.device(device), self.kv.to(dtype)
        if device.type == "cuda" and not kv.is_cuda:
            kv = kv.pin_memory()
        return replace(self, kv=kv.to(device, non_blocking=True))

    def cpu(self) -> "ExplicitMemories":
        """The memories on the CPU."""
        return ExplicitMemories(kv=self.kv.cpu(), positions=self.positions.cpu(), num_kept=self.num_kept.cpu())

    def kept_positions(self, row: int) -> np.ndarray:
        """Places of the kept tokens in the reference of ``row``, int16 [L, G, kept]."""
        return self.positions.numpy()[row, :, :, : int(self.num_kept.numpy()[row])]

    def valid_slots(self) -> Tensor:
        """Which slots hold a kept token, bool [N, K]."""
        return torch.arange(self.kv.shape[4]) < self.num_kept[:, None]

    def vectors(self, part: int, held_LG: Tensor) -> np.ndarray:
        """All kept keys (``part`` 0) or values (1), float32 [vectors, D], by reference, layer, head, token.

        Those of heads that hold no memory, by ``held_LG``, are left out.
        """
        valid_NLGK = self.valid_slots()[:, None, None, :] & held_LG[..., None]
        return self.kv[:, :, part][valid_NLGK].numpy()

    @staticmethod
    def concatenate(parts: Sequence["ExplicitMemories"]) -> "ExplicitMemories":
        """The memories of all ``parts``, in order."""
        return ExplicitMemories(
            kv=torch.cat([part.kv for part in parts]),
            positions=torch.cat([part.positions for part in parts]),
            num_kept=torch.cat([part.num_kept for part in parts]),
        )

    @staticmethod
    def empty(num_layers: int, num_heads: int, num_kept_tokens: int, head_size: int) -> "ExplicitMemories":
        """No memories, of a given shape."""
        shape = (0, num_layers, num_heads, num_kept_tokens)
        return ExplicitMemories(
            kv=torch.zeros(0, num_layers, 2, num_heads, num_kept_tokens, head_size),
            positions=torch.zeros(shape, dtype=torch.int16),
            num_kept=torch.zeros(0, dtype=torch.int32),
        )
