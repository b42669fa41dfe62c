"""The joint sequence: references and context in one forward pass, so that gradients flow through the references (3.5).

A sequence is ``[references | prefix | context]``. Token-wise layers do not know of the parts. Prefix and context
together are the *trunk*. References stand first, so that dropping them after the last memory layer keeps a contiguous
tail, and the trunk's causal attention needs no gathering. Positions are explicit: prefix 0..p-1, every reference
p..p+127, context from p+128 (or from 0 where there is no prefix).

Letters: S joint sequence, B batch, C chunks, N references (at most one a chunk), R tokens of a reference, T trunk,
H and G heads, D head size, K kept tokens, M references of all sequences.
"""

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_m3.config import Config, ModelConfig
from megatron_m3.model.rope import Rope, rotate
from megatron_m3.model.selection import local_memory_heads, select_in_layer
from megatron_m3.ops.choice import choose_backend
from megatron_m3.ops.memory_attention import get_backend


def trunk_positions(prefix_length: int, reference_length: int, context_length: int) -> Tensor:
    """Positions of prefix and context: the context follows the interval of the references, if there is a prefix."""
    start = prefix_length + (reference_length if prefix_length else 0)
    return torch.cat([torch.arange(prefix_length), torch.arange(context_length) + start])


def _rope_table(layout: "JointLayout", head: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every row, after ``head`` rows of references; the same in every layer, so kept."""
    length = layout.config.memory.reference_length
    return _table(
        layout.config.model, layout.prefix_length, length, layout.context_length, head // length, device, dtype
    )


@functools.lru_cache(maxsize=16)
def _table(
    model: ModelConfig, prefix: int, reference: int, context: int, count: int, device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    once = torch.arange(reference) + prefix
    positions = torch.cat([once.repeat(count), trunk_positions(prefix, reference, context)]).to(device)
    # one more axis for the batch
    return Rope.of(model).table(positions[:, None], dtype)


@dataclass(frozen=True, kw_only=True)
class JointLayout:
    """Attention plan of a training pass: which rows are what, at which positions, reading which memories."""

    config: Config
    """Shapes, memory layers, window and selection rule."""
    prefix_length: int
    """Tokens of the prefix; 0 in the warmup stage."""
    context_length: int
    """Rows of the context, padding included."""
    reference_lengths_BN: Tensor | None
    """Tokens of each reference, 0 where it is missing; None in the warmup stage."""
    reference_chunks_BN: Tensor | None = None
    """The chunk that each reference belongs to, a different one for each that is not missing; by default reference n
    belongs to chunk n."""
    num_kept_tokens: int | None = None
    """Tokens kept of a full reference for each key-value head; by default the config's."""

    @property
    def num_reference_rows(self) -> int:
        """Rows at the head of the sequence that hold references."""
        lengths = self.reference_lengths_BN
        return 0 if lengths is None else lengths.shape[1] * self.config.memory.reference_length

    def attend(self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """See :class:`megatron_m3.model.attention.AttentionPlan`; the last memory layer returns the trunk alone."""
        backend = get_backend(choose_backend(self.config.model).name)
        carries_references = self.reference_lengths_BN is not None and layer <= self.config.memory_layers[-1]
        head = self.num_reference_rows if carries_references else 0
        table = _rope_table(self, head, query_SBHD.device, query_SBHD.dtype)
        query_BSHD, key_BSGD = (rotate(part, table).transpose(0, 1) for part in (query_SBHD, key_SBGD))
        value_BSGD = value_SBGD.transpose(0, 1)
        trunk = query_BSHD[:, head:], key_BSGD[:, head:], value_BSGD[:, head:]
        if not carries_references:
            return backend.causal_attention(*trunk).transpose(0, 1)
        rotated = query_BSHD[:, :head], key_BSGD[:, :head], value_BSGD[:, :head]
        if layer in self.config.memory_layers:
            memories = self._memories(layer, query_SBHD[:head], key_SBGD[:head], *rotated[1:])
            out_BTHD = backend.memory_attention(
                *trunk, *memories, prefix_length=self.prefix_length,
                chunk_length=self.config.memory.chunk_length, window=self.config.memory.window,
            )
        else:
            out_BTHD = backend.causal_attention(*trunk)
        if layer == self.config.memory_layers[-1]:
            return out_BTHD.transpose(0, 1)
        references_BSHD = self._attend_in_references(backend, rotated, trunk)
        return torch.cat([references_BSHD, out_BTHD], 1).transpose(0, 1)

    def _split(self, rows_BSHD: Tensor) -> Tensor:
        """Reference rows ``[B, N * R, heads, D]`` as ``[B * N, R, heads, D]``."""
        return rows_BSHD.reshape(-1, self.config.memory.reference_length, *rows_BSHD.shape[2:])

    def _memories(
        self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, rotated_key_BSGD: Tensor, value_BSGD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Kept keys and values ``[B, C, K, G, D]`` of each chunk's reference, and which are read, ``[B, C, K]``.

        Where not all key-value heads hold memory, the latter is ``[B, C, K, G]``.
        """
        assert self.reference_lengths_BN is not None
        B, N = self.reference_lengths_BN.shape
        indices_MGK, valid_MK = select_in_layer(
            self.config, layer,
            self._split(query_SBHD.detach().transpose(0, 1)),
            self._split(key_SBGD.detach().transpose(0, 1)),
            self._split(value_BSGD.detach()),
            self.reference_lengths_BN.flatten(), self.num_kept_tokens or self.config.memory.num_kept_tokens,
        )
        index_MKGD = indices_MGK.transpose(1, 2)[..., None].expand(-1, -1, -1, key_SBGD.shape[-1])
        kept = [self._split(rows).gather(1, index_MKGD) for rows in (rotated_key_BSGD, value_BSGD)]
        key, value = (rows.reshape(B, N, *rows.shape[1:]) for rows in kept)
        key, value, valid_BCK = self._by_chunk(key, value, valid_MK.reshape(B, N, -1))
        heads_G = local_memory_heads(self.config, layer)
        return key, value, valid_BCK if heads_G is None else valid_BCK[..., None] & heads_G.to(valid_BCK.device)

    def _by_chunk(self, key_BNKGD: Tensor, value_BNKGD: Tensor, valid_BNK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The memories in the order of the chunks, with empty ones for chunks that have none."""
        if self.reference_chunks_BN is None:
            return key_BNKGD, value_BNKGD, valid_BNK
        C = self.context_length // self.config.memory.chunk_length
        here_BNC = self.reference_chunks_BN[..., None] == torch.arange(C, device=valid_BNK.device)
        here_BNC = here_BNC & valid_BNK.any(-1, keepdim=True)
        number_BC = here_BNC.int().argmax(1)
        rows_B1 = torch.arange(len(number_BC), device=number_BC.device)[:, None]
        key_BCKGD, value_BCKGD, valid_BCK = (part[rows_B1, number_BC] for part in (key_BNKGD, value_BNKGD, valid_BNK))
        return key_BCKGD, value_BCKGD, valid_BCK & here_BNC.any(1)[..., None]

    def _attend_in_references(
        self, backend: ModuleType, rotated: tuple[Tensor, ...], trunk: tuple[Tensor, ...]
    ) -> Tensor:
        """Each reference's tokens read the prefix and their own reference: ``[B, N * R, H, D]``."""
        B, rows = rotated[0].shape[:2]
        count = rows // self.config.memory.reference_length
        prefix = (part[:, : self.prefix_length].repeat_interleave(count, 0) for part in trunk[1:])
        out_NRHD = backend.reference_attention(*map(self._split, rotated), *prefix)
        return out_NRHD.reshape(B, rows, *out_NRHD.shape[2:])
