"""Speed of generation with recall beside the same model without memory: bank on disk, caches smaller than what is read.

    python -m tests.benchmarks.bench_generation

Random weights, real glosses. The floor is plain generation: no prefix, no retrieval, no memories. Shards are dropped
from the page cache before every measured call. On a busy machine the CPU seconds of this process say more.
"""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools import embed, index, references, tokenizer, wordnet
from launch import build_bank
from megatron_m3.config import ParallelConfig, get_recipe, replace_fields
from megatron_m3.platform.distributed import initialize_parallel, shut_down

if TYPE_CHECKING:
    from megatron_m3.inference.engine import Engine
    from megatron_m3.inference.generation import Statistics

SHAPE = {"model.num_layers": "8", "model.num_heads": "8", "model.num_kv_heads": "2", "model.head_size": "64",
         "model.hidden_size": "512", "model.ffn_size": "1024", "model.vocab_size": "8192"}
BATCH, NUM_REFERENCES, CACHED_MEMORIES, PREFETCH_TOKENS, ROUNDS = 8, 1000, 24, 16, 5
LENGTHS = ((128, 128), (128, 320))
"""Prompt tokens and new tokens; the first pair is the paper's."""


def make_artifacts(folder: Path, shape: Mapping[str, str] = SHAPE, num_references: int = NUM_REFERENCES) -> None:
    """Texts, tokenizer, references, embeddings, index, a random checkpoint and its bank; leaves the world."""
    from megatron_m3.model.checkpoint import save_checkpoint
    from megatron_m3.model.gpt import build_model

    at = lambda name: str(folder / name)  # noqa: E731
    wordnet.main(["--output", at("texts"), "--train-entries", "20000"])
    tokenizer.main(["--input", at("texts/train.jsonl"), "--vocab-size", "8192", "--output", at("tokenizer")])
    with (folder / "texts/references.jsonl").open() as lines:
        (folder / "references.jsonl").write_text("".join(itertools.islice(lines, num_references)))
    references.main(["--input", at("references.jsonl"), "--tokenizer", at("tokenizer"), "--output", at("references")])
    embed.main(["--references", at("references"), "--output", at("embeddings")])
    index.main(["--references", at("references"), "--embeddings", at("embeddings"), "--output", at("index")])
    config = replace_fields(get_recipe("demo"), dict(shape))
    save_checkpoint(folder / "run", 1, build_model(config), replace_fields(config, {"data.tokenizer": at("tokenizer")}))
    build_bank.main(["--checkpoint", at("run"), "--references", at("references"), "--output", at("bank")])


def open_engines(folder: Path, *, cuda_graphs: bool = False) -> tuple["Engine", "Engine", "Engine"]:
    """The floor, and engines that read memories from the bank: when a chunk ends, and reading ahead.

    All use one copy of the weights: with one each, the same steps of two engines differed by up to a tenth.
    """
    from megatron_m3.inference.engine import Engine
    from megatron_m3.memory import MemoryBank, WarmSource
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.retrieval import Retriever

    loaded = load_model(folder / "run")
    bank = MemoryBank.open(folder / "bank", weights_hash=loaded.weights_hash)
    one = bank.read([0])
    budgets = {"cache_bytes": CACHED_MEMORIES * bank.record_bytes,
               "decoded_bytes": CACHED_MEMORIES * (one.kv.nbytes + one.positions.nbytes + one.num_kept.nbytes)}
    retriever = Retriever.open(folder / "index", folder / "references", loaded.tokenizer)
    print(f"bank: {len(bank):,} memories of {bank.record_bytes:,} bytes, codec {bank.codec_name}; "
          f"cache of {CACHED_MEMORIES} memories")
    with_memory = replace(loaded, config=bank.configure(loaded.config))
    floor = Engine(loaded, cuda_graphs=cuda_graphs)
    engines = [Engine(with_memory, retriever, WarmSource(bank, **budgets), prefetch_tokens=tokens,
                      cuda_graphs=cuda_graphs) for tokens in (0, PREFETCH_TOKENS)]
    for engine in engines:
        engine.decoder = floor.decoder
    return floor, engines[0], engines[1]


def prompts_of(folder: Path, engine: "Engine", length: int, first: int, count: int = BATCH) -> list[list[int]]:
    """Token ids of texts from the corpus, other ones for every ``first``."""
    lines = (folder / "texts/train.jsonl").read_text().splitlines()
    texts = (json.loads(line)["text"] for line in lines[first:])
    tokens = (engine.loaded.tokenizer.encode(text)[:length] for text in texts)
    long_enough = (prompt for prompt in tokens if len(prompt) == length)
    return [next(long_enough) for _ in range(count)]


def drop_page_cache(folder: Path) -> None:
    """Make the next read of every shard come from the disk."""
    for path in (folder / "bank").glob("*.bin"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, engines: tuple["Engine", "Engine", "Engine"], length: int, new: int) -> None:
    """Run all engines in turns, the next one in the other order, and print the least time of each phase and ratios."""
    calls: tuple[list[tuple[Statistics, float]], ...] = ([], [], [])
    for turn in range(ROUNDS):
        for engine, kept in list(zip(engines, calls, strict=True))[:: -1 if turn % 2 else 1]:
            drop_page_cache(folder)
            prompts = prompts_of(folder, engine, length, 20 * turn)
            begin = time.process_time()
            found = engine.generate_tokens(prompts, new, stop_at_eos=False)[1]
            kept.append((found, time.process_time() - begin))
    print(f"\nbatch {BATCH}, {length} tokens in, {new} out; best of {ROUNDS}")
    print(f"{'':<22}{'no memory':>12}{'memory':>12}{'ratio':>9}{'read ahead':>12}{'ratio':>9}")

    def row(name: str, plain: float, *others: float) -> None:
        print(f"{name:<22}{plain:>12,.2f}" + "".join(f"{one:>12,.2f}{one / plain:>9.3f}" for one in others))

    row("tokens/s", *(max(one.tokens_per_second for one, _ in kept) for kept in calls))
    row("tokens/CPU s", *(max(one.generated_tokens / seconds for one, seconds in kept) for kept in calls))
    row("prefill ms", *(1e3 * min(one.prefill_seconds for one, _ in kept) for kept in calls))
    row("decode ms a step", *(1e3 * min(one.decode_seconds for one, _ in kept) / (new - 1) for kept in calls))
    plain = [seconds for _, seconds in calls[0]]
    for name, call in zip(("memory", "read ahead"), calls[1:], strict=True):
        ratios = sorted(floor / seconds for floor, (_, seconds) in zip(plain, call, strict=True))
        print(f"{name}: ratio of tokens/CPU s in each turn {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    for name, call in zip(("memory", "read ahead"), calls[1:], strict=True):
        read = min((one for one, _ in call), key=lambda one: one.total_seconds)
        print(f"{name}: retrieval {1e3 * read.retrieval_seconds:.1f} ms, fetch {1e3 * read.fetch_seconds:.1f} ms of "
              f"{1e3 * read.total_seconds:,.0f} ms; {read.references_read} references read, {len(read.seen)} distinct, "
              f"{read.cache_hits} from the caches, {read.cache_misses} from disk; {read.prefetched} read ahead, "
              f"{read.prefetched_useful} of them useful, {1e3 * read.wait_seconds:.1f} ms waited for them")


def main() -> None:
    """Build everything in a temporary folder and print both measurements."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        initialize_parallel(ParallelConfig(), seed=1)
        make_artifacts(folder)
        engines = open_engines(folder)
        for engine in engines:
            engine.generate_tokens(prompts_of(folder, engine, 16, 0), 4, stop_at_eos=False)
        for length, new in LENGTHS:
            measure(folder, engines, length, new)
        shut_down()


if __name__ == "__main__":
    main()
