"""``m3 generate``: continue prompts with recall every 64 tokens, showing which references each chunk read."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.inference.engine import Engine
    from megatron_m3.inference.generation import Generation, Statistics
    from megatron_m3.memory import ColdMemories, MemoryBank
    from megatron_m3.model.checkpoint import LoadedModel
    from megatron_m3.references import ReferenceStore

FIRST_CHARACTERS = 60
MAX_NEW_TOKENS = 1_000_000
"""The key-value cache holds all of them from the start."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What to continue, with which memories, and how tokens are chosen."""

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
    prompt: str | None = None
    """Text to continue."""
    input: str = ""
    """JSONL file of prompts, {"prompt": "..."} a line, instead of --prompt."""
    max_new_tokens: int = 128
    """Tokens after which a text ends, if EOS does not end it before."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise tokens are drawn."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probabilities sum to this."""
    seed: int = 0
    """Random stream of the draws; a prompt's text does not depend on its batch."""
    batch: int = 32
    """Prompts continued together."""
    cache_bytes: int = 1 << 30
    """RAM for records that were read recently."""
    decoded_bytes: int = 1 << 28
    """Memory of the device for memories that were read recently, decoded."""
    prefetch_tokens: int = 0
    """So many tokens before a chunk is full, what it may read is read ahead in the background; 0 waits for its end."""
    max_overlap: float | None = None
    """Drop retrieved references whose overlap with the prompt (eq. 6) is larger; 0.667 when answers are evaluated."""
    json: bool = False
    """Print JSON: results with tokens and what each chunk read, and statistics."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.input):
            raise ConfigError("prompt: give --prompt or --input, one of them")
        for name in ("max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_new_tokens > MAX_NEW_TOKENS:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be at most {MAX_NEW_TOKENS:,}")
        try:
            (self.prompt or "").encode()
        except UnicodeEncodeError:
            raise ConfigError(f"prompt={self.prompt!a}: not UTF-8; give text in UTF-8") from None
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


def main(argv: Sequence[str] | None = None) -> None:
    """Continue the prompts and print what was read and written."""
    options = parse(GenerateOptions, argv, "m3 generate", __doc__ or "")
    from megatron_m3.platform import select

    select()
    from megatron_m3.inference.generation import Statistics
    from megatron_m3.inference.sampling import Sampling

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    prompts = [options.prompt] if options.prompt is not None else read_prompts(Path(options.input))
    engine, total, results = build_engine(options), Statistics(), []
    for first in range(0, len(prompts), options.batch):
        found, statistics = engine.generate(prompts[first : first + options.batch], options.max_new_tokens, sampling)
        total.add(statistics)
        results += found
        if not options.json:
            print("\n\n".join(describe(one) for one in found), end="\n\n")
    if options.json:
        json.dump({"results": [one.to_dict() for one in results], "statistics": total.to_dict()}, sys.stdout, indent=2)
        print()
    else:
        print(summary(total), file=sys.stderr)


def build_engine(options: GenerateOptions) -> "Engine":
    """Open all that generation reads; each artifact is checked against those it was made from."""
    from megatron_m3.inference.engine import Engine
    from megatron_m3.inference.forward import delivery
    from megatron_m3.memory import MemorySource
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.retrieval import Retriever

    loaded = load_model(Path(options.checkpoint))
    if options.no_memory:
        return Engine(loaded)
    retriever = Retriever.open(options.index, options.references, loaded.tokenizer)
    if retriever.references.reference_length > loaded.config.memory.reference_length:
        raise ConfigError(
            f"references={options.references}: up to {retriever.references.reference_length} tokens each, this model "
            f"reads at most {loaded.config.memory.reference_length}; make them again with that --reference-length"
        )
    loaded, records = open_records(options, loaded, retriever.references)
    source = MemorySource(records, delivery(loaded), cache_bytes=options.cache_bytes,
                          decoded_bytes=options.decoded_bytes)
    return Engine(loaded, retriever, source, max_overlap=options.max_overlap, prefetch_tokens=options.prefetch_tokens)


def open_records(
    options: GenerateOptions, loaded: "LoadedModel", references: "ReferenceStore"
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


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file.

    Raises:
        DataError: names the line that is not a JSON object with a prompt.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a JSONL file as --input")
    prompts = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if raw.strip():
            try:
                prompt = json.loads(raw.decode("utf-8"))["prompt"]
                prompt.encode("utf-8")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise DataError(f'{path}, line {number}: not {{"prompt": "..."}} in UTF-8; mend the line') from None
            prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: no lines; give at least one prompt")
    return prompts


def describe(generation: "Generation") -> str:
    """What every chunk read, then the prompt and its continuation."""
    return "\n".join([*_readings(generation), f"prompt: {generation.prompt}", f"continuation: {generation.text}"])


def _readings(generation: "Generation") -> Iterator[str]:
    for chunk in generation.chunks:
        last = chunk.first_token + chunk.num_tokens - 1
        yield f"{chunk.part} tokens {chunk.first_token}-{last} read " + ("" if chunk.references else "nothing")
        for reference in chunk.references:
            text = " ".join(reference.text.split())
            start = text if len(text) <= FIRST_CHARACTERS else text[:FIRST_CHARACTERS].rsplit(" ", 1)[0] + " …"
            yield f"  {reference.id:>10}  {reference.score:6.3f}  {start}"


def summary(statistics: "Statistics") -> str:
    """One line of speed and reuse."""
    one = statistics.to_dict()
    reading = (
        f"; {one['references_read']} references read, {one['distinct_references']} distinct, "
        f"cache {one['cache_hits']} hits {one['cache_misses']} misses; "
        f"retrieval {one['retrieval_seconds']:.2f} s, fetch {one['fetch_seconds']:.2f} s"
    )
    if one["prefetched"]:
        reading += f"; {one['prefetched']} read ahead, {one['prefetched_wasted']} of them in vain"
    return (
        f"{one['generated_tokens']} tokens in {one['total_seconds']:.2f} s, {one['tokens_per_second']:.1f} tokens/s "
        f"(prefill {one['prefill_seconds']:.2f} s, decode {one['decode_seconds']:.2f} s)"
        + (reading if one["references_read"] else "")
    )


if __name__ == "__main__":
    exit_on_user_error(main)
