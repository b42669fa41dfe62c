"""Batches per second of the torch and DALI loaders, beside a bare np.memmap read of the same tokens.

    python -m tests.benchmarks.bench_loader

The corpus is WordNet's; its neighbours are drawn at random, so the leakage filter mostly sees texts that do not match.
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools import references, tokenize, tokenizer, wordnet
from megatron_m3.config import Config, DataConfig, TrainingConfig
from megatron_m3.data import TokenStore, TrainingDataset, build_loader
from megatron_m3.references import ReferenceStore
from tests.small_data import write_neighbours

SEQUENCE_LENGTH, MICRO_BATCH, BATCHES = 2048, 4, 100


def make_data(folder: Path) -> Config:
    """Artifacts of 20,000 entries in ``folder``, and a config that reads them."""
    made = {name: str(folder / name) for name in ("tokenizer", "tokens", "references", "neighbours")}
    wordnet.main(["--output", str(folder / "texts"), "--train-entries", "20000"])
    train, known = str(folder / "texts" / "train.jsonl"), str(folder / "texts" / "references.jsonl")
    tokenizer.main(["--input", train, "--output", made["tokenizer"]])
    tokenize.main(["--input", train, "--tokenizer", made["tokenizer"], "--output", made["tokens"]])
    references.main(["--input", known, "--tokenizer", made["tokenizer"], "--output", made["references"]])
    tokens, store = TokenStore.open(made["tokens"]), ReferenceStore.open(made["references"])
    write_neighbours(Path(made["neighbours"]), tokens, store, tokens.tokenizer_hash, chunk_length=64, num_neighbours=5)
    return Config(data=DataConfig(**made, sequence_length=SEQUENCE_LENGTH),
                  training=TrainingConfig(micro_batch=MICRO_BATCH, global_batch=MICRO_BATCH))


def rate(batches: Callable[[], object]) -> float:
    """Calls of ``batches`` per second, after a few to warm up."""
    for _ in range(10):
        batches()
    start = time.perf_counter()
    for _ in range(BATCHES):
        batches()
    return BATCHES / (time.perf_counter() - start)


def bare_read(config: Config) -> Callable[[], object]:
    """Reads MICRO_BATCH sequences' tokens at random places of tokens.bin, as int64, and nothing else."""
    tokens = np.memmap(Path(config.data.tokens) / "tokens.bin", np.uint16, mode="r")
    draw = np.random.default_rng(0)
    starts = itertools.cycle(draw.integers(len(tokens) - SEQUENCE_LENGTH, size=1000).tolist())
    return lambda: np.stack([tokens[start : start + SEQUENCE_LENGTH].astype(np.int64)
                             for start in itertools.islice(starts, MICRO_BATCH)])


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_data(Path(folder))
        floor = rate(bare_read(config))
        print(f"{'':<24}{'batches/s':>12}{'tokens/s':>14}{'of the bare read':>18}")
        per_batch = SEQUENCE_LENGTH * MICRO_BATCH
        print(f"{'bare np.memmap':<24}{floor:>12,.0f}{floor * per_batch:>14,.0f}{1:>18.3f}")
        for stage, loader in itertools.product(("warmup", "continual"), ("torch", "dali")):
            chosen = dataclasses.replace(config, data=dataclasses.replace(config.data, loader=loader),
                                         training=dataclasses.replace(config.training, stage=stage))
            reader = build_loader(chosen, TrainingDataset(chosen), consumed=0, data_rank=0, data_size=1)
            found = rate(lambda reader=reader: next(reader))
            print(f"{stage + ', ' + loader:<24}{found:>12,.1f}{found * per_batch:>14,.0f}{found / floor:>18.3f}")


if __name__ == "__main__":
    main()
