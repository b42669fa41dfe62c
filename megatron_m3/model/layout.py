"""The joint sequence: references and context in one forward pass, so that gradients flow through the references (3.5).

A sequence is ``[references | prefix | context]``. Token-wise layers do not know of the parts. Prefix and context
together are the *trunk*. References stand first, so that dropping them after the last memory layer keeps a contiguous
tail, and the trunk's causal attention needs no gathering. Positions are explicit: prefix 0..p-1, every reference
p..p+127, context from p+128 (or from 0 where there is no prefix). A reference sees the prefix and itself alone, so a
chunk may read one that stands in another sequence of the batch, and many chunks the same.

Letters: S joint sequence, B batch, C chunks, N references in a sequence, R tokens of a reference, T trunk,
H and G heads, D head size, K kept tokens, M references of all sequences.
"""

import functools
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from megatron_m3.config import Config, ModelConfig
from megatron_m3.model.held_memories import HeldMemories, Kept
from megatron_m3.model.rope import Rope
from megatron_m3.model.selection import local_memory_heads, select_in_layer
from megatron_m3.ops.choice import choose_backend
from megatron_m3.ops.memory_attention import get_backend
from megatron_m3.ops.rope import Table, rotate

type Memories = tuple[Tensor, Tensor, Tensor]
"""Kept keys and values ``[B, C, K, G, D]`` of each chunk's reference, and which are read, ``[B, C, K]``.

Where not all key-value heads hold memory, the latter is ``[B, C, K, G]``.
"""


def trunk_positions(prefix_length: int, reference_length: int, context_length: int) -> Tensor:
    """Positions of prefix and context: the context follows the interval of the references, if there is a prefix."""
    start = prefix_length + (reference_length if prefix_length else 0)
    return torch.cat([torch.arange(prefix_length), torch.arange(context_length) + start])


def _rope_table(layout: "JointLayout", head: int, device: torch.device, dtype: torch.dtype) -> Table:
    """Cosines and sines of every row, after ``head`` rows of references: the end of a table with as many as may be.

    That is the same in every layer and pass, so it is kept.
    """
    length, rows = layout.config.memory.reference_length, head + layout.prefix_length + layout.context_length
    most = max(head // length, layout.config.num_references)
    cosine, sine = _table(
        layout.config.model, layout.prefix_length, length, layout.context_length, most, device, dtype)
    return cosine[len(cosine) - rows :], sine[len(sine) - rows :]


@functools.lru_cache(maxsize=16)
def _table(
    model: ModelConfig, prefix: int, reference: int, context: int, count: int, device: torch.device,
    dtype: torch.dtype,
) -> Table:
    once = torch.arange(reference) + prefix
    with torch.inference_mode(False):  # what one pass keeps, a pass with gradients may use
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
    """Tokens of each reference, 0 where it is missing; None where no rows are references."""
    chunk_references_BC: Tensor | None = None
    """Which of the M references each chunk has, and after them of the held ones, -1 for none; by default chunk c has
    its sequence's reference c."""
    num_kept_tokens: int | None = None
    """Tokens kept of a full reference for each key-value head; by default the config's."""
    memories: dict[int, Memories] = field(default_factory=dict)
    """What memory layers read where references are not among the rows."""
    held: HeldMemories | None = None
    """Memories of earlier passes that chunks read, and where those of this pass go."""

    @property
    def num_reference_rows(self) -> int:
        """Rows at the head of the sequence that hold references."""
        lengths = self.reference_lengths_BN
        return 0 if lengths is None else lengths.shape[1] * self.config.memory.reference_length

    @property
    def _backend(self) -> ModuleType:
        return get_backend(choose_backend(self.config.model).name)

    def attend(self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """See :class:`megatron_m3.model.attention.AttentionPlan`; the last memory layer returns the trunk alone."""
        last = self.config.memory_layers[-1]
        head = self.num_reference_rows if layer <= last else 0
        references, trunk = self.rotated(head, query_SBHD, key_SBGD, value_SBGD)
        memories = self.memories.get(layer)
        if (head or self.held) and layer in self.config.memory_layers:
            memories = self.choose(layer, query_SBHD[:head], key_SBGD[:head], *references[1:])
        out_TBHD = self.attend_in_trunk(trunk, memories).transpose(0, 1)
        if not head or layer == last:
            return out_TBHD
        # put together sequence first, as the layer wants it, so that this is the only copy
        return torch.cat([self.attend_in_references(references, trunk).transpose(0, 1), out_TBHD])

    def rotated(
        self, head: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Queries, keys after RoPE and values of the first ``head`` rows, and of the others, batch first."""
        table = _rope_table(self, head, query_SBHD.device, query_SBHD.dtype)
        backend = choose_backend(self.config.model).name
        turned = (rotate(part, table, backend) for part in (query_SBHD, key_SBGD))
        # values come as a view of the whole projection, which would be kept for the backward pass with them
        whole = [part.transpose(0, 1) for part in (*turned, value_SBGD.contiguous())]
        return tuple(part[:, :head] for part in whole), tuple(part[:, head:] for part in whole)

    def attend_in_trunk(self, trunk: tuple[Tensor, ...], memories: Memories | None) -> Tensor:
        """The trunk's tokens read memories, where there are any, and the trunk up to themselves."""
        backend, memory = self._backend, self.config.memory
        if memories is None:
            return backend.causal_attention(*trunk)
        return backend.memory_attention(
            *trunk, *memories, prefix_length=self.prefix_length, chunk_length=memory.chunk_length, window=memory.window,
        )

    def _split(self, rows_BSHD: Tensor) -> Tensor:
        """Reference rows ``[B, N * R, heads, D]`` as ``[B * N, R, heads, D]``."""
        return rows_BSHD.reshape(-1, self.config.memory.reference_length, *rows_BSHD.shape[2:])

    def choose(
        self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, rotated_key_BSGD: Tensor, value_BSGD: Tensor
    ) -> Memories | None:
        """The memories that chunks have in a memory layer: from the rows that hold references, and held ones."""
        kept = self._select(layer, query_SBHD, key_SBGD, rotated_key_BSGD, value_BSGD) if len(key_SBGD) else None
        if self.held is not None:
            kept = self.held.join(layer, kept)
        if kept is None:
            return None
        key, value, valid_BCK = self._by_chunk(*kept)
        heads_G = local_memory_heads(self.config, layer, valid_BCK.device)
        return key, value, valid_BCK if heads_G is None else valid_BCK[..., None] & heads_G

    def _select(
        self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, rotated_key_BSGD: Tensor, value_BSGD: Tensor
    ) -> Kept:
        """The kept tokens of each reference among the rows."""
        assert self.reference_lengths_BN is not None
        indices_MGK, valid_MK = select_in_layer(
            self.config, layer,
            self._split(query_SBHD.detach().transpose(0, 1)),
            self._split(key_SBGD.detach().transpose(0, 1)),
            self._split(value_BSGD.detach()),
            self.reference_lengths_BN.flatten(), self.num_kept_tokens or self.config.memory.num_kept_tokens,
        )
        index_MKGD = indices_MGK.transpose(1, 2)[..., None].expand(-1, -1, -1, key_SBGD.shape[-1])
        kept_key, kept_value = (self._split(rows).gather(1, index_MKGD) for rows in (rotated_key_BSGD, value_BSGD))
        return kept_key, kept_value, valid_MK

    def _by_chunk(self, key_MKGD: Tensor, value_MKGD: Tensor, valid_MK: Tensor) -> Memories:
        """The memories in the order of the chunks, with empty ones for chunks that have none."""
        assert self.reference_lengths_BN is not None
        if self.chunk_references_BC is None:
            B = len(self.reference_lengths_BN)
            key, value, valid = (part.reshape(B, -1, *part.shape[1:]) for part in (key_MKGD, value_MKGD, valid_MK))
            return key, value, valid
        places_BC = self.chunk_references_BC.clamp_min(0)
        valid_BCK = valid_MK[places_BC] & (self.chunk_references_BC >= 0)[..., None]
        return key_MKGD[places_BC], value_MKGD[places_BC], valid_BCK

    def attend_in_references(self, references: tuple[Tensor, ...], trunk: tuple[Tensor, ...]) -> Tensor:
        """Each reference's tokens read the prefix and their own reference: ``[B, N * R, H, D]``."""
        B, rows = references[0].shape[:2]
        count = rows // self.config.memory.reference_length
        prefix = (part[:, : self.prefix_length].repeat_interleave(count, 0) for part in trunk[1:])
        out_NRHD = self._backend.reference_attention(*map(self._split, references), *prefix)
        return out_NRHD.reshape(B, rows, *out_NRHD.shape[2:])
