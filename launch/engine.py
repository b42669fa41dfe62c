"""Which model generates, and where its memories come from: options of the jobs that generate, and their engine."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m3.errors import ConfigError

if TYPE_CHECKING:
    from megatron_m3.inference.engine import Engine
    from megatron_m3.memory import ColdMemories, MemoryBank
    from megatron_m3.model.checkpoint import LoadedModel
    from megatron_m3.references import ReferenceStore


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Model and memories."""

    checkpoint: str
    """Checkpoint, or the folder of a run, whose newest one is taken."""
    references: str = ""
    """Folder of the knowledge base."""
    index: str = ""
    """Folder of the vector index over the references."""
    bank: str = ""
    """Memory bank of this checkpoint, a folder or an http address (warm start); without it references are encoded when
    first read (cold start)."""
    codec: str = ""
    """Cold start: the codec/ folder of a bank of this checkpoint, through which memories pass; else numbers stay as
    they are."""
    bank_cache: str = ""
    """Local folder that keeps records of memories: those of a bank that is far away, or, in a cold start, those that
    the model wrote."""
    bank_cache_bytes: int = 1 << 34
    """What the record folder may take up on disk; whole files go, the longest unused first."""
    no_memory: bool = False
    """Plain generation: no prefix, no references."""
    cache_bytes: int = 1 << 30
    """RAM for records that were read recently."""
    decoded_bytes: int = 1 << 28
    """Memory of the device for memories that were read recently, decoded."""
    prefetch_tokens: int = 0
    """So many tokens before a chunk is full, what it may read is read ahead in the background; 0 waits for its end."""
    cuda_graphs: bool = False
    """On a card: launch a step as one CUDA graph once its batch has stayed the same for some steps."""
    max_overlap: float | None = None
    """Drop retrieved references whose overlap with the prompt (eq. 6) is larger; 0.667 when answers are evaluated."""

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "decoded_bytes", "bank_cache_bytes", "prefetch_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 (nothing) or more")
        if self.max_overlap is not None and not 0 <= self.max_overlap <= 1:
            raise ConfigError(f"max_overlap={self.max_overlap}: must be from 0 to 1")
        memory_only = ("references", "index", "bank", "codec", "bank_cache", "prefetch_tokens", "max_overlap")
        unset = {"max_overlap": None, "prefetch_tokens": 0}
        given = [name for name in memory_only if getattr(self, name) != unset.get(name, "")]
        if self.no_memory and given:
            raise ConfigError(f"{given[0]}: not read with --no-memory; leave one of them out")
        if self.bank and self.codec:
            raise ConfigError("codec: the bank has its own; leave out --codec or --bank")
        if not self.no_memory and not (self.references and self.index):
            raise ConfigError(
                f"{'index' if self.references else 'references'}: missing; memory needs --references and --index "
                "(and --bank for a warm start), or give --no-memory"
            )


def build_engine(options: EngineOptions) -> "Engine":
    """Open all that generation reads; each artifact is checked against those it was made from."""
    from megatron_m3.inference.engine import Engine
    from megatron_m3.inference.forward import delivery
    from megatron_m3.memory import MemorySource
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.retrieval import Retriever

    loaded = load_model(Path(options.checkpoint))
    if options.no_memory:
        return Engine(loaded, cuda_graphs=options.cuda_graphs)
    retriever = Retriever.open(options.index, options.references, loaded.tokenizer)
    if retriever.references.reference_length > loaded.config.memory.reference_length:
        raise ConfigError(
            f"references={options.references}: up to {retriever.references.reference_length} tokens each, this model "
            f"reads at most {loaded.config.memory.reference_length}; make them again with that --reference-length"
        )
    loaded, records = open_records(options, loaded, retriever.references)
    source = MemorySource(records, delivery(loaded), cache_bytes=options.cache_bytes,
                          decoded_bytes=options.decoded_bytes)
    return Engine(loaded, retriever, source, max_overlap=options.max_overlap, prefetch_tokens=options.prefetch_tokens,
                  cuda_graphs=options.cuda_graphs)


def open_records(
    options: EngineOptions, loaded: "LoadedModel", references: "ReferenceStore"
) -> tuple["LoadedModel", "MemoryBank | ColdMemories"]:
    """The model as the records want it, and where they come from: the bank, or the model."""
    from megatron_m3.manifest import check_input
    from megatron_m3.memory import ColdMemories, MemoryBank

    records: MemoryBank | ColdMemories
    if options.bank:
        records = MemoryBank.open(options.bank, weights_hash=loaded.weights_hash, tokenizer_hash=loaded.tokenizer.hash)
        check_input(records.address, records.manifest, "references", references.hash)
        loaded = replace(loaded, config=records.configure(loaded.config))
    else:
        records = ColdMemories.open(loaded, references, options.codec)
    if options.bank_cache:
        records.keep_in(Path(options.bank_cache), options.bank_cache_bytes)
    return loaded, records
