"""Prompts that are continued together: their tokens, their cache, and what their chunks read."""

import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_m3.inference.cache import CachePlan, CacheShape
from megatron_m3.inference.forward import local_kv_heads, logits_at
from megatron_m3.inference.generation import ChunkReading, Generation, ReadReference, Statistics
from megatron_m3.inference.reading import ChunkMemories, ReadingPlan
from megatron_m3.inference.recall import Recall
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.gpt import logits
from megatron_m3.model.layout import trunk_positions
from megatron_m3.model.rope import Rope

Part = Literal["prompt", "generated"]


class Batch:
    """State of one generation; ``prefill``, then ``append`` and ``step`` in turn."""

    def __init__(
        self,
        loaded: LoadedModel,
        recall: Recall | None,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_at_eos: bool,
        prefetch_tokens: int = 0,
    ) -> None:
        """``prefetch_tokens`` before the end of a chunk, what it may read is brought; 0: it is not."""
        self.loaded, self.config, self.recall = loaded, loaded.config, recall
        self.prompts, self.max_new_tokens = [list(prompt) for prompt in prompts], max_new_tokens
        self.chunk_length = self.config.memory.chunk_length
        self.prefix = list(loaded.prefix_ids) if recall else []
        self.prefetch_tokens = prefetch_tokens if recall else 0
        self.eos = loaded.tokenizer.eos_id if stop_at_eos else None
        self.lengths = [1 + len(prompt) for prompt in self.prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.active = [True] * len(prompts)
        self.num_steps = 0
        self.read: list[list[tuple[Part, int, list[ReadReference]]]] = [[] for _ in prompts]
        self.statistics = Statistics(prompt_tokens=sum(map(len, self.prompts)))

    def prefill(self) -> Tensor:
        """Read prefix and prompts in one pass and fill the cache; the logits after each prompt, [B, V]."""
        memories = self._recall_prompts(self.recall) if self.recall else None
        started = time.perf_counter()
        parameter, model = next(self.loaded.model.parameters()), self.config.model
        rope, prefix, longest = Rope.of(model), len(self.prefix), max(self.lengths)
        positions_T = trunk_positions(prefix, self.config.memory.reference_length, longest).to(parameter.device)
        heads = local_kv_heads(self.config)
        shape = CacheShape(
            batch=len(self.prompts),
            num_layers=model.num_layers,
            num_kv_heads=heads.stop - heads.start,
            head_size=model.head_size,
            prefix_length=prefix,
            context_start=int(positions_T[prefix]),
            max_context=longest + self.max_new_tokens,
            memory_layers=tuple(memories.layers) if memories else (),
            memory_heads=memories.memory_heads if memories else {},
            num_slots=memories.num_slots if memories else 0,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        self.cache = CachePlan(shape, rope)
        plan = ReadingPlan(
            rope,
            positions_T,
            prefix_length=prefix,
            chunk_length=self.chunk_length,
            memories=memories,
            keep=self.cache.keep,
            backend=model.attention,
        )
        bos, padding = self.loaded.tokenizer.bos_id, self.loaded.tokenizer.eos_id
        rows = [[*self.prefix, bos, *p, *[padding] * (longest - 1 - len(p))] for p in self.prompts]
        last_B = torch.tensor(self.lengths, device=parameter.device) - 1
        logits_BV = logits_at(
            self.loaded.model,
            torch.tensor(rows, device=parameter.device),
            plan,
            torch.arange(len(rows), device=parameter.device),
            last_B + prefix,
            model.vocab_size,
        )
        self.cache.begin(self.lengths)
        if memories:
            self.cache.recall(memories.chunk(last_B // self.chunk_length))
        self.statistics.prefill_seconds = time.perf_counter() - started
        return logits_BV

    def append(self, newest_B: Tensor) -> bool:
        """Take one more token of every sequence; whether any goes on."""
        self.newest_B = newest_B
        self.num_steps += 1
        for row, token in enumerate(newest_B.tolist()):
            if self.active[row]:
                self.active[row] = token != self.eos
                self.tokens[row] += [token] if self.active[row] else []
        return any(self.active) and self.num_steps < self.max_new_tokens

    def step(self) -> Tensor:
        """Read the newest token of every sequence; the logits after it, [B, V]. A full chunk first recalls anew."""
        if self.recall and self.num_steps % self.chunk_length == 0:
            self._recall_generated(self.recall)
        if self.recall and self.prefetch_tokens:
            self._look_ahead(self.recall)
        started = time.perf_counter()
        self.cache.step()
        logits_BSV = logits(self.loaded.model, self.newest_B[:, None], self.cache, self.config.model.vocab_size)
        self.statistics.decode_seconds += time.perf_counter() - started
        return logits_BSV[:, -1]

    def _look_ahead(self, recall: Recall) -> None:
        """Some tokens before a chunk that will recall is full, begin to bring what it may read."""
        is_time = -self.num_steps % self.chunk_length == self.prefetch_tokens
        if is_time and self.num_steps + self.prefetch_tokens < self.max_new_tokens:
            rows = [row for row, active in enumerate(self.active) if active]
            begun = self.chunk_length - self.prefetch_tokens
            recall.look_ahead([self.tokens[row][-begun:] for row in rows], [self.prompts[row] for row in rows])

    def generations(self) -> list[Generation]:
        """What was generated so far."""
        self.statistics.generated_tokens = sum(map(len, self.tokens))
        decode = self.loaded.tokenizer.decode
        return [
            Generation(
                prompt=decode(prompt), text=decode(tokens), tokens=tokens, ended=not active, chunks=self._readings(row)
            )
            for row, (prompt, tokens, active) in enumerate(zip(self.prompts, self.tokens, self.active, strict=True))
        ]

    def _readings(self, row: int) -> list[ChunkReading]:
        total = {"prompt": len(self.prompts[row]), "generated": len(self.tokens[row])}
        return [
            ChunkReading(
                part=part, first_token=first, num_tokens=min(self.chunk_length, total[part] - first), references=read
            )
            for part, first, read in self.read[row]
            if first < total[part]
        ]

    def _recall_prompts(self, recall: Recall) -> ChunkMemories:
        """The memories of the prompts' chunks; what follows a prompt's last chunk inherits that chunk's."""
        chunks = [cut(prompt, self.chunk_length) for prompt in self.prompts]
        questions = [prompt for prompt, of_prompt in zip(self.prompts, chunks, strict=True) for _ in of_prompt]
        recalled = recall([chunk for of_prompt in chunks for chunk in of_prompt], questions, self.statistics)
        count_B1 = np.array([[len(of_prompt)] for of_prompt in chunks])
        first_B1, has_chunk_B1 = count_B1.cumsum(0) - count_B1, count_B1 > 0
        num_chunks = -(-max(self.lengths) // self.chunk_length)
        chunk_BC = (first_B1 + np.minimum(np.arange(num_chunks), count_B1 - 1)) * has_chunk_B1
        for row, of_prompt in enumerate(chunks):
            inherited: list[ReadReference] = []
            for place in range(len(of_prompt)):
                inherited = recall.references(recalled, int(first_B1[row, 0]) + place)
                self.read[row].append(("prompt", place * self.chunk_length, inherited))
            self.read[row].append(("generated", 0, inherited))
        return recall.memories_of(recalled, chunk_BC, has_chunk_B1)

    def _recall_generated(self, recall: Recall) -> None:
        """Replace the memories of the sequences that go on by what their newest chunk retrieves."""
        rows = [row for row, active in enumerate(self.active) if active]
        newest = [self.tokens[row][-self.chunk_length :] for row in rows]
        recalled = recall(newest, [self.prompts[row] for row in rows], self.statistics)
        for chunk, row in enumerate(rows):
            self.read[row].append(("generated", self.num_steps, recall.references(recalled, chunk)))
        started = time.perf_counter()
        each = np.arange(len(rows))[:, None]
        self.cache.recall(recall.memories_of(recalled, each, each >= 0), rows)
        self.statistics.fetch_seconds += time.perf_counter() - started


def cut(tokens: list[int], length: int) -> list[list[int]]:
    """Tokens in pieces of ``length``, the last one shorter if need be."""
    return [tokens[first : first + length] for first in range(0, len(tokens), length)]
