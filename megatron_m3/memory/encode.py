"""Writing explicit memories: a causal pass over ``[prefix | reference]`` keeps the most attended tokens (3.2, 3.3).

Letters: N references, T tokens (P of them prefix), L memory layers, X key or value, H query heads, G key-value heads
(both the local tensor-parallel shard), K kept tokens, D head size, S sequence, B batch, E hidden.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_m3.config import Config
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.rope import Rope
from megatron_m3.model.selection import select_in_layer
from megatron_m3.ops.choice import choose_backend
from megatron_m3.ops.memory_attention import get_backend
from megatron_m3.ops.rope import Table, rotate

if TYPE_CHECKING:
    from megatron_m3.memory.codec import Codec
    from megatron_m3.memory.record import RecordLayout

BATCH_TOKENS = 8192


def encode_references(
    loaded: LoadedModel, tokens_NT: Tensor | np.ndarray, lengths_N: Tensor | np.ndarray, *,
    batch_tokens: int = BATCH_TOKENS,
) -> ExplicitMemories:
    """Explicit memories of references, each encoded alone behind the prefix, with the config's memory settings.

    References are taken in order of length, so that little is padded; padding stands behind a reference and never
    reaches it. The result is whole (all key-value heads) on every tensor-parallel rank.

    Args:
        loaded: the model; memory layers, kept tokens and selection rule are those of its config.
        tokens_NT: token ids, padded on the right with anything.
        lengths_N: tokens of each reference.
        batch_tokens: most tokens, padding included, in one pass (at least one reference is).

    Returns:
        The memories in the order given; the same inputs give the same bits.
    """
    return encode_variants(loaded, tokens_NT, lengths_N, [loaded.config], batch_tokens=batch_tokens)[0]


def encode_variants(
    loaded: LoadedModel, tokens_NT: Tensor | np.ndarray, lengths_N: Tensor | np.ndarray, configs: Sequence[Config], *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[ExplicitMemories]:
    """The memories of the same references under several memory settings, from one pass.

    What a layer keeps never changes what stands above it, so layers, kept tokens and selection may all differ.

    Args:
        loaded: the model.
        tokens_NT: as for :func:`encode_references`.
        lengths_N: tokens of each reference.
        configs: of this model, each with its own ``memory`` section.
        batch_tokens: most tokens, padding included, in one pass (at least one reference is).

    Returns:
        One for each of ``configs``.
    """
    return [late.collect() for late in start_encoding(loaded, tokens_NT, lengths_N, configs, batch_tokens=batch_tokens)]


def start_encoding(
    loaded: LoadedModel, tokens_NT: Tensor | np.ndarray, lengths_N: Tensor | np.ndarray, configs: Sequence[Config], *,
    batch_tokens: int = BATCH_TOKENS,
) -> list["LateMemories"]:
    """:func:`encode_variants` without waiting for the device: another thread may collect what comes."""
    tokens_NT, lengths_N = torch.as_tensor(tokens_NT).long(), torch.as_tensor(lengths_N).long()
    order = torch.argsort(lengths_N, stable=True)
    passes: list[list[ExplicitMemories]] = []
    first = len(order)
    while first > 0:
        longest = max(1, int(lengths_N[order[first - 1]]))
        count = max(1, batch_tokens // (len(loaded.prefix_ids) + longest))
        rows = order[max(0, first - count) : first]
        passes.insert(0, _encode_batch(loaded, tokens_NT[rows, :longest], lengths_N[rows], configs))
        first -= len(rows)
    if not passes:
        return [LateMemories([_no_memories(config)], order) for config in configs]
    back = torch.argsort(order)
    return [LateMemories(list(variant), back) for variant in zip(*passes, strict=True)]


class LateMemories:
    """Memories that a CUDA device may still be busy with: batches there, and the order in which they are wanted."""

    def __init__(self, batches: Sequence[ExplicitMemories], order_N: Tensor) -> None:
        self.batches, self.order_N = batches, order_N
        self.device = batches[0].kv.device
        self.written = None
        if self.device.type == "cuda":
            self.written = torch.cuda.current_stream(self.device).record_event()

    def collect(self) -> ExplicitMemories:
        """The memories on the CPU, once they are there."""
        with self._stream():
            return self._whole().cpu()

    def records(self, codec: "Codec", layout: "RecordLayout") -> np.ndarray:
        """Their records in a bank, uint8 [N, bytes]; on the device of ``codec`` memories become codes.

        Raises:
            M3Error: a key or value is not finite.
        """
        with self._stream():
            memories = self._whole()
            return layout.pack(codec.encode(memories), memories.positions, memories.num_kept)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """Work that waits for the memories, and not for what the device was given after them."""
        if self.written is None:
            yield
            return
        stream = _side_stream(self.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self.written)
            try:
                yield
            finally:
                stream.synchronize()  # the batches' room may be given away after this

    def _whole(self) -> ExplicitMemories:
        """All of them in the order wanted, keys and values on the device."""
        parts = [replace(batch, positions=batch.positions.cpu(), num_kept=batch.num_kept.cpu())
                 for batch in self.batches]
        return ExplicitMemories.concatenate(parts)[self.order_N]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device beside the passes: what the allocator gave to a stream, it keeps for that stream."""
    return torch.cuda.Stream(device)


def _no_memories(config: Config) -> ExplicitMemories:
    model, kept = config.model, config.memory.num_kept_tokens
    return ExplicitMemories.empty(len(config.memory_layers), model.num_kv_heads, kept, model.head_size)


def _encode_batch(
    loaded: LoadedModel, tokens_NT: Tensor, lengths_N: Tensor, configs: Sequence[Config]
) -> list[ExplicitMemories]:
    plan = EncodePlan(configs, len(loaded.prefix_ids), lengths_N.to(loaded.device))
    run_encoding(loaded, tokens_NT, plan)
    return plan.memories()


@torch.no_grad()
def run_encoding(loaded: LoadedModel, tokens_NT: Tensor, plan: "EncodePlan") -> None:
    """One pass; nothing above the queries, keys and values of the plan's last memory layer is computed."""
    model, prefix_P = loaded.model, torch.tensor(loaded.prefix_ids)
    whole_NT = torch.cat([prefix_P.expand(len(tokens_NT), -1), tokens_NT], 1).to(loaded.device)
    last = max(config.memory_layers[-1] for config in plan.configs)
    hidden_SBE = model.embedding(whole_NT, None)
    for layer in model.decoder.layers[:last]:
        hidden_SBE, _ = layer(hidden_SBE, attention_mask=None, attention_bias=plan)
    top = model.decoder.layers[last]
    query, key, value = top.self_attention.get_query_key_value_tensors(top.input_layernorm(hidden_SBE))[:3]
    plan.keep(last, query, key, value, plan.rotate(key))


class EncodePlan:
    """Attention of an encoding pass: causal over ``[prefix | reference]``, and memory layers keep their tokens."""

    def __init__(self, configs: Sequence[Config], prefix_length: int, lengths_N: Tensor) -> None:
        self.configs, self.prefix_length, self.lengths_N = configs, prefix_length, lengths_N
        self.rope = Rope.of(configs[0].model)
        self.table: Table | None = None
        self.backend_name = choose_backend(configs[0].model).name
        self.backend = get_backend(self.backend_name)
        self.kv: list[list[Tensor]] = [[] for _ in configs]
        self.positions: list[list[Tensor]] = [[] for _ in configs]

    def attend(self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """See :class:`megatron_m3.model.attention.AttentionPlan`."""
        rotated_SBGD = self.rotate(key_SBGD)
        self.keep(layer, query_SBHD, key_SBGD, value_SBGD, rotated_SBGD)
        query, key, value = (part.transpose(0, 1) for part in (self.rotate(query_SBHD), rotated_SBGD, value_SBGD))
        return self.backend.causal_attention(query, key, value).transpose(0, 1)

    def rotate(self, part_SBHD: Tensor) -> Tensor:
        """Queries or keys after RoPE."""
        if self.table is None:
            positions_S1 = torch.arange(len(part_SBHD), device=part_SBHD.device)[:, None]
            self.table = self.rope.table(positions_S1, part_SBHD.dtype)
        return rotate(part_SBHD, self.table, self.backend_name)

    def keep(
        self, layer: int, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, rotated_SBGD: Tensor
    ) -> None:
        """Select by queries and keys before RoPE, prefix excluded; keep the keys after RoPE, and values."""
        keeping = [place for place, config in enumerate(self.configs) if layer in config.memory_layers]
        if not keeping:
            return
        query_NTHD, key_NTGD, rotated_NTGD, value_NTGD = (
            part[self.prefix_length :].transpose(0, 1) for part in (query_SBHD, key_SBGD, rotated_SBGD, value_SBGD)
        )
        for place in keeping:
            config = self.configs[place]
            indices_NGK, valid_NK = select_in_layer(
                config, layer, query_NTHD, key_NTGD, value_NTGD, self.lengths_N, config.memory.num_kept_tokens
            )
            index_NGKD = indices_NGK[..., None].expand(-1, -1, -1, key_NTGD.shape[-1])
            kept = [part.transpose(1, 2).gather(2, index_NGKD) for part in (rotated_NTGD, value_NTGD)]
            kv_NXGKD = torch.stack(kept, 1).float().masked_fill(~valid_NK[:, None, None, :, None], 0)
            missing = config.memory.num_kept_tokens - valid_NK.shape[1]
            self.kv[place].append(torch.nn.functional.pad(kv_NXGKD, (0, 0, 0, missing)))
            self.positions[place].append(torch.nn.functional.pad(indices_NGK.int(), (0, missing)))

    def memories(self) -> list[ExplicitMemories]:
        """What was kept for each of the configs, gathered over the tensor-parallel ranks, on the device."""
        return [
            ExplicitMemories(
                kv=gather_heads(torch.stack(kv, 1), 3),
                positions=gather_heads(torch.stack(positions, 1), 2).to(torch.int16),
                num_kept=self.lengths_N.clamp(max=config.memory.num_kept_tokens).int(),
            )
            for config, kv, positions in zip(self.configs, self.kv, self.positions, strict=True)
        ]


def gather_heads(local: Tensor, dim: int) -> Tensor:
    """The heads of all tensor-parallel ranks along ``dim``."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim)
