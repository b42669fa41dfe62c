"""Prompts that are continued together: their tokens, their cache, and what their chunks read."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_m3.errors import M3Error
from megatron_m3.inference.cache import CachePlan, CacheShape
from megatron_m3.inference.decoder import Decoder
from megatron_m3.inference.forward import local_kv_heads
from megatron_m3.inference.generation import Continuation, ReadReference, Statistics
from megatron_m3.inference.reading import ChunkMemories, PrefixKeyValues, ReadingPlan
from megatron_m3.inference.recall import Recall
from megatron_m3.inference.sampling import choose
from megatron_m3.inference.steps import Steps
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.layout import trunk_positions
from megatron_m3.model.rope import Rope
from megatron_m3.ops.choice import choose_backend

NOT_FINITE = ("checkpoint: its logits are no numbers or infinite; the training diverged, or a memory is broken: "
              "take another checkpoint, or build the bank again")


def concerns_all(error: Exception) -> bool:
    """Whether no sequence of a batch is to blame: a device, or its memory, is gone."""
    return isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError | MemoryError)


class Batch:
    """Continuations that grow together: ``prefill``, then ``step`` after ``step`` while one goes on.

    Between steps others can join. What does not go on leaves with the next step. What cannot be continued has its
    ``failure`` set, unless that concerns all.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        decoder: Decoder,
        recall: Recall | None,
        continuations: Sequence[Continuation],
        *,
        prefix: PrefixKeyValues = (),
        stop_at_eos: bool = True,
        prefetch_tokens: int = 0,
        cuda_graphs: bool = False,
    ) -> None:
        """``decoder`` has the weights of ``loaded``, and ``prefix`` what it makes of the prefix.

        ``prefetch_tokens`` before the end of a chunk, what it may read is brought; 0: it is not. ``cuda_graphs``: see
        :class:`Steps`.
        """
        self.loaded, self.config, self.decoder, self.recall = loaded, loaded.config, decoder, recall
        self.continuations = list(continuations)
        self.chunk_length = self.config.memory.chunk_length
        self.prefix, self.cuda_graphs = prefix, cuda_graphs
        self.prefetch_tokens = prefetch_tokens if recall else 0
        self.eos = loaded.tokenizer.eos_id if stop_at_eos else None
        self.statistics = Statistics(prompt_tokens=sum(len(one.prompt) for one in self.continuations))

    @property
    def goes_on(self) -> bool:
        """Whether any continuation wants another token."""
        return any(one.goes_on for one in self.continuations)

    def prefill(self) -> None:
        """Read the prompts in one pass, fill the cache, and take each one's first token."""
        prompts = [one.prompt for one in self.continuations]
        lengths = [1 + len(prompt) for prompt in prompts]
        memories = self._recall_prompts(self.recall) if self.recall else None
        started = time.perf_counter()
        parameter, model = next(self.loaded.model.parameters()), self.config.model
        rope, longest = Rope.of(model), max(lengths)
        prefix = len(self.prefix[0][0]) if self.prefix else 0
        positions_T = trunk_positions(prefix, self.config.memory.reference_length, longest).to(parameter.device)
        heads = local_kv_heads(self.config)
        shape = CacheShape(
            batch=len(prompts),
            num_layers=model.num_layers,
            num_kv_heads=heads.stop - heads.start,
            head_size=model.head_size,
            prefix_length=prefix,
            context_start=int(positions_T[prefix]),
            max_context=self._columns(),
            memory_layers=tuple(memories.layers) if memories else (),
            memory_heads=memories.memory_heads if memories else {},
            num_slots=memories.num_slots if memories else 0,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        backend = choose_backend(model).name
        self.cache = CachePlan(shape, rope, backend)
        self.steps = Steps(self.decoder, self.cache, graphs=self.cuda_graphs)
        plan = ReadingPlan(
            rope,
            positions_T[prefix:],
            prefix_length=prefix,
            chunk_length=self.chunk_length,
            prefix=self.prefix,
            memories=memories,
            keep=self.cache.keep,
            backend=backend,
        )
        bos, padding = self.loaded.tokenizer.bos_id, self.loaded.tokenizer.eos_id
        rows = [[bos, *p, *[padding] * (longest - 1 - len(p))] for p in prompts]
        last_B = torch.tensor(lengths, device=parameter.device) - 1
        logits_BV = self.decoder(torch.tensor(rows, device=parameter.device), plan, last_B)
        self.cache.begin(lengths)
        if memories:
            self.cache.recall(memories.chunk(last_B // self.chunk_length))
        self._append(logits_BV)
        self.statistics.prefill_seconds += time.perf_counter() - started

    def _columns(self) -> int:
        """Context tokens of the longest continuation when it is done."""
        return max(1 + len(one.prompt) + one.max_new_tokens for one in self.continuations)

    def _append(self, logits_BV: Tensor) -> None:
        """Take each one's next token, which waits for the device: only then its work has its time."""
        self.newest_B = choose(logits_BV, [one.draw for one in self.continuations])
        for one, token in zip(self.continuations, self.newest_B.tolist(), strict=True):
            if token < 0:
                one.failure = one.failure or M3Error(NOT_FINITE)
            if one.failure is None:
                one.ended = token == self.eos
                one.tokens += [] if one.ended else [token]

    def join(self, other: "Batch") -> None:
        """Take the continuations of another batch, which has been prefilled; their order stays, behind one's own."""
        self.cache.join(other.cache)
        self.continuations += other.continuations
        self.newest_B = torch.cat([self.newest_B, other.newest_B])
        self.statistics.add(other.statistics)

    def _leave(self) -> None:
        """Let go of the continuations that do not go on."""
        rows = [row for row, one in enumerate(self.continuations) if one.goes_on]
        if len(rows) < len(self.continuations):
            self.continuations = [self.continuations[row] for row in rows]
            self.newest_B = self.newest_B[rows]
            self.cache.only(rows, self._columns())

    def step(self) -> None:
        """Read the newest token of each continuation that goes on, and take its next one; one at least goes on.

        A full chunk first recalls anew.
        """
        self._leave()
        if self.recall:
            self._recall_generated(self.recall)
            self._look_ahead(self.recall)
        started = time.perf_counter()
        logits_BV = self.steps(self.newest_B)
        self._append(logits_BV)
        self.statistics.decode_seconds += time.perf_counter() - started

    def _look_ahead(self, recall: Recall) -> None:
        """Some tokens before a chunk that will recall is full, begin to bring what it may read."""
        ahead, begun = self.prefetch_tokens, self.chunk_length - self.prefetch_tokens
        near = [one for one in self.continuations if ahead and -len(one.tokens) % self.chunk_length == ahead
                and len(one.tokens) + ahead < one.max_new_tokens]
        if near:
            recall.look_ahead([one.tokens[-begun:] for one in near], [one.prompt for one in near])

    def _recall_prompts(self, recall: Recall) -> ChunkMemories:
        """The memories of the prompts' chunks; what follows a prompt's last chunk inherits that chunk's."""
        chunks = [cut(one.prompt, self.chunk_length) for one in self.continuations]
        questions = [one.prompt for one, of_prompt in zip(self.continuations, chunks, strict=True) for _ in of_prompt]
        recalled = recall([chunk for of_prompt in chunks for chunk in of_prompt], questions, self.statistics)
        count_B1 = np.array([[len(of_prompt)] for of_prompt in chunks])
        first_B1, has_chunk_B1 = count_B1.cumsum(0) - count_B1, count_B1 > 0
        longest = 1 + max(len(one.prompt) for one in self.continuations)
        num_chunks = -(-longest // self.chunk_length)
        chunk_BC = (first_B1 + np.minimum(np.arange(num_chunks), count_B1 - 1)) * has_chunk_B1
        for first, one, of_prompt in zip(first_B1[:, 0].tolist(), self.continuations, chunks, strict=True):
            inherited: list[ReadReference] = []
            for place in range(len(of_prompt)):
                inherited = recall.references(recalled, first + place)
                one.read.append(("prompt", place * self.chunk_length, inherited))
            one.read.append(("generated", 0, inherited))
        return recall.memories_of(recalled, chunk_BC, has_chunk_B1)

    def _recall_generated(self, recall: Recall) -> None:
        """Replace the memories of the continuations whose chunk is full by what it retrieves.

        In one process, those for which that fails fail alone; several must go on with the same ones.
        """
        rows = [row for row, one in enumerate(self.continuations) if len(one.tokens) % self.chunk_length == 0]
        if not rows:
            return
        try:
            self._recall_rows(recall, rows)
        except Exception as error:
            if self.config.parallel.tensor > 1 or concerns_all(error):
                raise
            for row in rows:
                try:
                    self._recall_rows(recall, [row])
                except Exception as its_error:
                    if concerns_all(its_error):
                        raise
                    self.continuations[row].failure = its_error

    def _recall_rows(self, recall: Recall, rows: list[int]) -> None:
        full = [self.continuations[row] for row in rows]
        recalled = recall([one.tokens[-self.chunk_length :] for one in full], [one.prompt for one in full],
                          self.statistics)
        found = [recall.references(recalled, chunk) for chunk in range(len(full))]
        started = time.perf_counter()
        each = np.arange(len(rows))[:, None]
        self.cache.recall(recall.memories_of(recalled, each, each >= 0), rows)
        self.statistics.fetch_seconds += time.perf_counter() - started
        for one, references in zip(full, found, strict=True):
            one.read.append(("generated", len(one.tokens), references))


def cut(tokens: list[int], length: int) -> list[list[int]]:
    """Tokens in pieces of ``length``, the last one shorter if need be."""
    return [tokens[first : first + length] for first in range(0, len(tokens), length)]
