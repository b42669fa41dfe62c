"""Generation with recall: prefill in one pass, one token a step, new memories after every chunk (section 3.1)."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from megatron_m3.errors import ConfigError
from megatron_m3.inference.batch import Batch
from megatron_m3.inference.decoder import Decoder
from megatron_m3.inference.forward import local_kv_heads, restricted_heads
from megatron_m3.inference.generation import Continuation, Generation, Statistics
from megatron_m3.inference.reading import PrefixKeyValues, read_prefix
from megatron_m3.inference.recall import Recall
from megatron_m3.inference.sampling import Draw, Sampling, draws
from megatron_m3.inference.steps import check_graphs
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.model.rope import Rope
from megatron_m3.ops.choice import choose_backend

if TYPE_CHECKING:
    from megatron_m3.memory import MemorySource
    from megatron_m3.retrieval import Retriever


class Engine:
    """Generates with one loaded model: with a retriever and a memory source it reads memories, without it is a GPT."""

    def __init__(
        self, loaded: LoadedModel, retriever: "Retriever | None" = None, source: "MemorySource | None" = None, *,
        max_overlap: float | None = None, prefetch_tokens: int = 0, cuda_graphs: bool = False,
    ) -> None:
        """Without ``retriever`` and ``source`` there is no prefix either, and positions count from 0.

        The weights must not change from now on: on the CPU they are copied (see :func:`.linear.frozen_linear`).

        ``max_overlap`` drops references that overlap more than this with the prompt (eq. 6; 2/3 in evaluations).
        ``prefetch_tokens`` before a generated chunk ends, its text begins to bring what it may read; 0 waits for the
        end. What is generated does not depend on it.
        ``cuda_graphs`` repeats steps as CUDA graphs, which :func:`check_graphs` may refuse.
        """
        assert (retriever is None) == (source is None), "memory needs a retriever and a source"
        self.loaded, self.config = loaded, loaded.config
        self.decoder = Decoder(loaded.model, loaded.config)
        self.recall: Recall | None = None
        self.prefix: PrefixKeyValues = ()
        if not 0 <= prefetch_tokens < self.config.memory.chunk_length:
            raise ConfigError(f"prefetch_tokens={prefetch_tokens}: must be 0 (none) or less than the "
                              f"{self.config.memory.chunk_length} tokens of a chunk")
        self.prefetch_tokens, self.cuda_graphs = prefetch_tokens, cuda_graphs
        if cuda_graphs:
            check_graphs(self.config, loaded.device)
        if retriever is not None and source is not None:
            self.recall = Recall(
                retriever,
                source,
                references_per_chunk=self.config.memory.references_per_chunk,
                memory_heads=self.config.memory_heads,
                heads=local_kv_heads(self.config),
                restricted_heads=restricted_heads(self.config, loaded.device),
                device=loaded.device,
                max_overlap=max_overlap,
            )
            with torch.inference_mode():
                self.prefix = read_prefix(self.decoder, loaded.prefix_ids, Rope.of(self.config.model), loaded.device,
                                          choose_backend(self.config.model).name)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling | Sequence[Draw] | None = None,
        *,
        stop_at_eos: bool = True,
    ) -> tuple[list[Generation], Statistics]:
        """Continue every prompt, together as one batch.

        Args:
            prompts: texts; they may differ in length and may be empty.
            max_new_tokens: tokens after which a sequence ends, if EOS does not end it before.
            sampling: greedy if not given; one :class:`Draw` a prompt where they are a part of those that
                :func:`draws` was given.
            stop_at_eos: False goes on behind EOS, to the limit.

        Returns:
            One :class:`Generation` a prompt, in order, and the call's :class:`Statistics`.
        """
        ids = self.loaded.tokenizer.encode_batch(prompts)
        found, statistics = self.generate_tokens(ids, max_new_tokens, sampling, stop_at_eos=stop_at_eos)
        return [replace(one, prompt=prompt) for one, prompt in zip(found, prompts, strict=True)], statistics

    @torch.inference_mode()
    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | Sequence[Draw] | None = None,
        *,
        stop_at_eos: bool = True,
    ) -> tuple[list[Generation], Statistics]:
        """:meth:`generate` for prompts that are token ids already, without special tokens."""
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        if not prompts:
            return [], Statistics()
        started = time.perf_counter()
        counts = replace(self.recall.source.counts) if self.recall else None
        drawn = sampling if isinstance(sampling, Sequence) else draws(sampling or Sampling(), prompts)
        continuations = [Continuation(prompt=list(prompt), max_new_tokens=max_new_tokens, draw=draw)
                         for prompt, draw in zip(prompts, drawn, strict=True)]
        batch = self.batch(continuations, stop_at_eos=stop_at_eos)
        batch.prefill()
        while batch.goes_on:
            _check(continuations)
            batch.step()
        _check(continuations)
        batch.statistics.generated_tokens = sum(len(one.tokens) for one in continuations)
        batch.statistics.total_seconds = time.perf_counter() - started
        if self.recall and counts:
            self.recall.finish()
            batch.statistics.count_reading(self.recall.source.counts.since(counts))
        return [self.generation(one) for one in continuations], batch.statistics

    def batch(self, continuations: Sequence[Continuation], *, stop_at_eos: bool = True) -> Batch:
        """Continuations that begin together; it is filled and stepped in :class:`torch.inference_mode`."""
        return Batch(self.loaded, self.decoder, self.recall, continuations, prefix=self.prefix,
                     stop_at_eos=stop_at_eos, prefetch_tokens=self.prefetch_tokens, cuda_graphs=self.cuda_graphs)

    def generation(self, continuation: Continuation) -> Generation:
        """What a continuation generated so far, as text."""
        return continuation.generation(self.loaded.tokenizer, self.config.memory.chunk_length)


def _check(continuations: Sequence[Continuation]) -> None:
    """Raise what went wrong with one of a call's continuations."""
    for one in continuations:
        if one.failure is not None:
            raise one.failure
