"""Generation on a card: with recall from a bank on disk, without memory, and with the references as text, in one run.

    python -m tests.benchmarks.bench_card_generation [--record] [--dry]

m3-0.9b's shape in bf16 with random weights, real glosses, a bank that is dropped from the page cache before every call,
and caches smaller than what is read. All calls in turn, timed by CUDA events from the first prompt token to the last
new one; then all of them again with steps as CUDA graphs. ``--dry`` goes the same way, without graphs, on any machine
with a small model, and says nothing about a card.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_m3.config import ParallelConfig
from megatron_m3.platform.distributed import initialize_parallel, shut_down
from tests.benchmarks import results
from tests.benchmarks.bench_card_training import milliseconds
from tests.benchmarks.bench_generation import drop_page_cache, make_artifacts, open_engines, prompts_of
from tests.benchmarks.bench_peers import with_texts

SHAPE = {"model.num_layers": "40", "model.num_heads": "32", "model.num_kv_heads": "8", "model.head_size": "64",
         "model.hidden_size": "2048", "model.ffn_size": "2048", "model.vocab_size": "8192", "training.dtype": "bf16"}
DRY_SHAPE = SHAPE | {"model.num_layers": "4", "model.num_heads": "4", "model.num_kv_heads": "2",
                     "model.hidden_size": "256", "model.ffn_size": "256"}
LIMITS = {(f"{what}{launched}", "recall"): 1 / least for what, least in (("generation", 0.97), ("against text", 1.3))
          for launched in ("", ", graphs")}
"""Largest ratios: recall against no memory, and against the references as text, without and with CUDA graphs."""
ROUNDS = 10


def measure(folder: Path, dry: bool, *, cuda_graphs: bool) -> tuple[dict[str, list[float]], tuple[int, int]]:
    """Milliseconds of each kind of call, and the batch and the tokens in and out."""
    cuda, batch, length = torch.cuda.is_available(), 2 if dry else 32, 128
    plain, recall, ahead = open_engines(folder, cuda_graphs=cuda_graphs)
    assert recall.recall is not None
    times: dict[str, list[float]] = {"floor": [], "recall": [], "recall, read ahead": [], "references as text": []}
    for turn in range(2 if dry else ROUNDS + 1):
        prompts = prompts_of(folder, plain, length, 20 * turn, batch)
        texts = with_texts(recall.recall.retriever, prompts, plain.loaded.config.memory.chunk_length)
        for (name, kept), engine, given in zip(
            times.items(), (plain, recall, ahead, plain), (prompts, prompts, prompts, texts), strict=True
        ):
            drop_page_cache(folder)

            def call(engine: Callable = engine.generate_tokens, given: list[list[int]] = given) -> None:
                assert engine(given, length, stop_at_eos=False)[1].generated_tokens == batch * length

            kept.append(milliseconds(call, cuda))
            print(f"turn {turn}: {name} {kept[-1]:,.1f} ms", file=sys.stderr)
    return {name: found[1:] for name, found in times.items()}, (batch, length)


def rows(times: dict[str, list[float]], size: tuple[int, int], launched: str) -> list[dict[str, object]]:
    """A row for each kind of call, and two for recall against text; ``launched`` says how."""
    made: list[dict[str, object]] = []
    calls = [("generation", "floor", name, name) for name in times]
    calls += [("against text", "references as text", "references as text", "floor"),
              ("against text", "references as text", "recall", "recall")]
    for direction, floor, name, what in calls:
        low, half, high = results.spread(times[name])
        made.append({"shape": "m3-0.9b", "batch": size[0], "tokens": 2 * size[1], "what": what,
                     "pass": direction + launched, "p20_ms": round(low, 2), "p50_ms": round(half, 2),
                     "p80_ms": round(high, 2), "ratio": round(half / results.spread(times[floor])[1], 3)})
    return made


def main() -> None:
    """Print times and ratios to the floors; exit with 1 where a limit is missed."""
    dry = results.dry_run()
    with tempfile.TemporaryDirectory() as name:
        initialize_parallel(ParallelConfig(), seed=1)
        make_artifacts(Path(name), DRY_SHAPE if dry else SHAPE, 200 if dry else 1000)
        found = rows(*measure(Path(name), dry, cuda_graphs=False), "")
        if not dry:
            found += rows(*measure(Path(name), dry, cuda_graphs=True), ", graphs")
        shut_down()
    sys.exit(not results.report("generation", found, {} if dry else LIMITS))


if __name__ == "__main__":
    main()
