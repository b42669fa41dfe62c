"""Memory³ in transformers: a model that opens a memory bank and generates with recall.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.open_bank("bank", index="index", references="references")
    found = model.generate_with_recall(**tokenizer(prompts), max_new_tokens=64)

``generate``, ``forward`` and all else stay transformers' own. It needs transformers and what that brings, faiss where
FAISS compressed the bank, and the package megatron_m3 where no other retriever is given.

Legend of shape suffixes: S tokens read, T cached tokens, H query heads, G kv heads, D head size, V vocabulary,
L memory layers, X key or value, M memory slots.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.utils import cached_file

from ckpt_convert.hf_memory.bank_memory3 import Bank, BankError, Retrieve, Tokens, open_retriever

ATTENTION = "memory3"
EVERY_HEAD: Mapping[int, Tensor] = {}
MIN_TEMPERATURE = 1e-3
"""Below it a division of the logits can overflow."""


@dataclass(frozen=True, kw_only=True)
class ReadReference:
    """One reference that a chunk read."""

    id: int
    score: float


@dataclass(frozen=True, kw_only=True)
class ChunkReading:
    """A chunk of the prompt or of the generated text, and what it read, best first."""

    part: Literal["prompt", "generated"]
    first_token: int
    """Counted from the start of its part."""
    references: list[ReadReference]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    tokens: list[int]
    """Generated tokens, without EOS."""
    ended: bool
    """Whether EOS came, rather than the limit of tokens."""
    chunks: list[ChunkReading]


def attention(module: Any, query_1HSD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, mask: None,
              scaling: float | None = None, memory_readers: Mapping[int, Tensor] = EVERY_HEAD,
              memory_slots: slice = slice(0), **unused: Any) -> tuple[Tensor, None]:
    """Attention of the newest S of T cached tokens to what stands before each; memories stand before all of them.

    In layers of ``memory_readers`` only its query heads, bool [H], see the columns ``memory_slots``.
    """
    H, S, T = query_1HSD.shape[1], query_1HSD.shape[2], key_1GTD.shape[2]
    readers_H, seen = memory_readers.get(module.layer_idx), None
    if S > 1 or readers_H is not None:
        seen = torch.ones(S, T, dtype=torch.bool, device=query_1HSD.device).tril(T - S)
    if seen is not None and readers_H is not None:
        seen = seen.repeat(H, 1, 1)
        seen[~readers_H.to(seen.device), :, memory_slots] = False
    out_1HSD = torch.nn.functional.scaled_dot_product_attention(
        query_1HSD, key_1GTD, value_1GTD, attn_mask=seen, scale=scaling, enable_gqa=True)
    return out_1HSD.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)


class Text:
    """A text that is being read: its cache, ``[prefix | memories | context]`` in the bank's layers."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.position, self.num_slots = model, DynamicCache(), 0, 0
        self.prefix: list[int] = model.config.memory["prefix_ids"]
        each = model.config.num_attention_heads // model.config.num_key_value_heads
        self.readers = {layer: held_G.repeat_interleave(each).to(model.device)
                        for layer, held_G in zip(model.bank.layers, model.bank.held_LG, strict=True)
                        if not held_G.all()}
        self.read(self.prefix)
        self.position += model.config.memory["reference_length"]

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read more tokens; the logits after them, [V]."""
        positions_S = torch.arange(self.position, self.position + len(tokens), device=self.model.device)
        self.position += len(tokens)
        ids_1S = torch.tensor([tokens], device=self.model.device)
        slots = slice(len(self.prefix), len(self.prefix) + self.num_slots)
        return self.model(input_ids=ids_1S, position_ids=positions_S[None], past_key_values=self.cache, use_cache=True,
                          logits_to_keep=1, memory_readers=self.readers, memory_slots=slots).logits[0, -1]

    def recall(self, ids: Sequence[int]) -> None:
        """Put the memories of some references in the place of those that are there."""
        kv_LXGMD = self.model.bank.fetch(ids)
        first, last = len(self.prefix), len(self.prefix) + self.num_slots
        for layer, kv_XGMD in zip(self.model.bank.layers, kv_LXGMD, strict=True):
            cached = self.cache.layers[layer]
            key_1GMD, value_1GMD = kv_XGMD[:, None].to(cached.keys)
            cached.keys = torch.cat([cached.keys[:, :, :first], key_1GMD, cached.keys[:, :, last:]], 2)
            cached.values = torch.cat([cached.values[:, :, :first], value_1GMD, cached.values[:, :, last:]], 2)
        self.num_slots = kv_LXGMD.shape[3]


class Sampler:
    """The next token of one text: greedy, or drawn from a random stream of its own."""

    def __init__(self, prompt: Sequence[int], occurrence: int, temperature: float, top_k: int, top_p: float,
                 seed: int) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        digest = zlib.crc32(np.asarray(prompt, np.int64).tobytes())
        self.stream = np.random.default_rng([seed, digest, len(prompt), occurrence])

    def choose(self, logits_V: Tensor) -> int:
        """A token id."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        probability_V, token_V = (logits_V.double() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        if self.top_k:
            probability_V[self.top_k :] = 0
            probability_V /= probability_V.sum()
        probability_V[probability_V.cumsum(-1) - probability_V >= self.top_p] = 0
        cumulative_V = probability_V.cumsum(-1)
        rank = int(torch.searchsorted(cumulative_V, self.stream.random() * cumulative_V[-1], right=True))
        return int(token_V[min(rank, int((probability_V > 0).sum()) - 1)])


class Recall:
    """What the models of all families learn here."""

    config: Any
    name_or_path: str
    bank: Bank | None = None
    retrieve: Retrieve | None = None

    def open_bank(self, bank: str | Path, retriever: Retrieve | None = None, *, index: str | Path | None = None,
                  references: str | Path | None = None) -> None:
        """Open a memory bank of this model, and what finds references in it.

        Args:
            bank: folder made by ``m3 bank build``.
            retriever: from the token ids of N chunks and a number k to ids, scores and validity, [N, k] each.
            index: without a retriever: folder made by ``m3 data index``; needs the package megatron_m3.
            references: without a retriever: the references that the bank was made from.

        Raises:
            BankError: the bank is damaged, or another model's.
        """
        memory, folders = self.config.memory, (index, references)
        if (retriever is None) != (None not in folders) or (retriever is not None and folders != (None, None)):
            raise ValueError("open_bank: give either a retriever, or index and references")
        opened = Bank(bank, memory)
        if index is not None and references is not None:
            file = cached_file(self.name_or_path, "tokenizer.json")
            retriever = open_retriever(opened, index, references, Tokens(file, memory["hashes"]["tokenizer"]))
        self.bank, self.retrieve = opened, retriever

    @torch.no_grad()
    def generate_with_recall(self, input_ids: Tensor | Sequence[Sequence[int]],
                             attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
                             token_type_ids: object = None, *, max_new_tokens: int = 128, temperature: float = 0.0,
                             top_k: int = 0, top_p: float = 1.0, seed: int = 0,
                             stop_at_eos: bool = True) -> list[Generation]:
        """Continue every prompt, one after another, with new memories after every chunk; see ``open_bank``.

        Args:
            input_ids: token ids of the prompts, with or without a BOS.
            attention_mask: 0 where a prompt is padded.
            token_type_ids: not read; some tokenizers return them.
            max_new_tokens: tokens after which a text ends, if EOS does not end it before.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
            top_k: draw among this many likeliest tokens; 0 among all.
            top_p: draw among the fewest likeliest tokens whose probabilities sum to this.
            seed: random stream; a text depends on it and on its prompt, not on the other prompts.
            stop_at_eos: False goes on behind EOS, to the limit.
        """
        if self.bank is None:
            raise BankError("no bank: call open_bank before generate_with_recall")
        is_drawable = temperature == 0 or MIN_TEMPERATURE <= temperature < float("inf")
        if max_new_tokens < 1 or not is_drawable or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError("generate_with_recall: max_new_tokens must be at least 1, temperature 0 or at least "
                             f"{MIN_TEMPERATURE}, top_k at least 0, top_p above 0 and at most 1")
        eos = self.config.eos_token_id
        stops = set() if not stop_at_eos else {eos} if isinstance(eos, int) else set(eos)
        seen: Counter[tuple[int, ...]] = Counter()
        results = []
        with self._attention():
            for prompt in self._prompts(input_ids, attention_mask):
                sampler = Sampler(prompt, seen[tuple(prompt)], temperature, top_k, top_p, seed)
                seen[tuple(prompt)] += 1
                results.append(self._continue(prompt, max_new_tokens, sampler, stops))
        return results

    def _prompts(self, input_ids: Any, attention_mask: Any) -> Iterator[list[int]]:
        """The prompts without padding and BOS, which every context begins with."""
        rows = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
        rows = [rows] if rows and isinstance(rows[0], int) else rows
        masks = attention_mask.tolist() if isinstance(attention_mask, Tensor) else attention_mask
        masks = [masks] if masks and isinstance(masks[0], int) else masks or [[1] * len(row) for row in rows]
        for row, mask in zip(rows, masks, strict=True):
            prompt = [token for token, is_there in zip(row, mask, strict=True) if is_there]
            yield prompt[prompt[:1] == self.config.memory["prefix_ids"][:1] :]

    @contextmanager
    def _attention(self) -> Iterator[None]:
        before = self.config._attn_implementation
        self.config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def _continue(self, prompt: list[int], max_new_tokens: int, sampler: Sampler, stops: set[int]) -> Generation:
        length, tokens, ended = self.config.memory["chunk_length"], [], False
        reads: list[tuple[Literal["prompt", "generated"], int, list[ReadReference]]] = []
        text, context, newest = Text(self), [self.config.memory["prefix_ids"][0], *prompt], []
        found = self._retrieve([prompt[first : first + length] for first in range(0, len(prompt), length)])
        for first in range(0, len(context), length):
            if found:
                newest = found.pop(0)
                reads.append(("prompt", first, newest))
                text.recall([reference.id for reference in newest])
            logits_V = text.read(context[first : first + length])
        reads.append(("generated", 0, newest))
        while True:
            token = sampler.choose(logits_V)
            if token in stops:
                ended = True
                break
            tokens.append(token)
            if len(tokens) == max_new_tokens:
                break
            if len(tokens) % length == 0:
                (newest,) = self._retrieve([tokens[-length:]])
                reads.append(("generated", len(tokens), newest))
                text.recall([reference.id for reference in newest])
            logits_V = text.read([token])
        chunks = [ChunkReading(part=part, first_token=first, references=references)
                  for part, first, references in reads if part == "prompt" or first < len(tokens)]
        return Generation(tokens=tokens, ended=ended, chunks=chunks)

    def _retrieve(self, chunks: list[list[int]]) -> list[list[ReadReference]]:
        """The references of each chunk, best first."""
        if not chunks:
            return []
        assert self.retrieve is not None
        ids, scores, valid = map(np.asarray, self.retrieve(chunks, self.config.memory["references_per_chunk"]))
        return [[ReadReference(id=int(ids[row, place]), score=float(scores[row, place]))
                 for place in np.flatnonzero(valid[row])] for row in range(len(chunks))]


class Memory3LlamaForCausalLM(Recall, LlamaForCausalLM):
    """Llama with recall."""


class Memory3MistralForCausalLM(Recall, MistralForCausalLM):
    """Mistral with recall."""


class Memory3Qwen2ForCausalLM(Recall, Qwen2ForCausalLM):
    """Qwen2 with recall."""


class Memory3Qwen3ForCausalLM(Recall, Qwen3ForCausalLM):
    """Qwen3 with recall."""
