"""Generation of a real model beside its peers: transformers, and the same model with the references as text.

    python -m tests.benchmarks.bench_peers --checkpoint RUN --references DIR --index INDEX --bank BANK --batch 1 8

Tokens a CPU second, which other processes disturb little, of greedy generation with the same weights in the same type:
transformers' generate (the checkpoint as `m3 convert to-hf` writes it), this engine without memory, with recall from
the bank, and without memory but with the five references of the prompt's last chunk put before it. Prompts are texts of
the references, each beginning elsewhere. All run in turn, round by round, and the best of each counts. A prefill is a
call for one token; a step is what each further token adds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckpt_convert import to_hf
from megatron_m3.config import ParallelConfig
from megatron_m3.platform.distributed import initialize_parallel, shut_down

REFERENCES = 5
Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def prompts_of(references: Any, count: int, length: int) -> list[list[int]]:
    """Token ids [count, length]: references one after another."""
    tokens, lengths = references.tokens(np.arange(min(len(references), 2 + 2 * count * length // 16)))
    whole = np.concatenate([row[:size] for row, size in zip(tokens, lengths, strict=True)])
    assert len(whole) >= count * length, "references: too few for so many prompts"
    return whole[: count * length].reshape(count, length).tolist()


def transformers_generate(checkpoint: str, folder: Path, dtype: torch.dtype) -> Generate:
    """Greedy generation by transformers."""
    from transformers import AutoModelForCausalLM

    to_hf.main([checkpoint, str(folder)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                             min_new_tokens=new, pad_token_id=0)
        return out[:, ids.shape[1] :].tolist()

    return generate


def engine_generate(engine: Any) -> Generate:
    """Greedy generation by this project's engine."""
    def generate(prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        return [one.tokens for one in engine.generate_tokens(prompts, new, stop_at_eos=False)[0]]

    return generate


def with_texts(retriever: Any, prompts: Sequence[Sequence[int]], chunk: int) -> list[list[int]]:
    """Each prompt behind the references that its last chunk retrieves, all of one length."""
    found = retriever.retrieve([prompt[-chunk:] for prompt in prompts], REFERENCES)
    texts = []
    for ids, prompt in zip(found.ids, prompts, strict=True):
        tokens, lengths = retriever.references.tokens(ids)
        texts.append([*np.concatenate([row[:size] for row, size in zip(tokens, lengths, strict=True)]).tolist(),
                      *prompt])
    shortest = min(map(len, texts))
    return [text[-shortest:] for text in texts]


def main() -> None:
    """Measure all in turn, for every type and batch, and print the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "references", "index", "bank"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    for name, default in (("prompt", 128), ("new", 128), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=[None],
                        help="of all; by default what it was trained with")
    options = parser.parse_args()
    initialize_parallel(ParallelConfig(), seed=1)
    for dtype in options.dtype:
        measure_type(dtype, options)
    shut_down()


def measure_type(dtype: Any, options: argparse.Namespace) -> None:
    """Measure with the weights in one type."""
    from megatron_m3.inference.engine import Engine
    from megatron_m3.memory import MemoryBank, WarmSource
    from megatron_m3.model.checkpoint import load_model, newest_checkpoint
    from megatron_m3.retrieval import Retriever

    loaded = load_model(newest_checkpoint(Path(options.checkpoint)), dtype=dtype)
    bank = MemoryBank.open(options.bank, weights_hash=loaded.weights_hash)
    retriever = Retriever.open(options.index, options.references, loaded.tokenizer)
    memory = Engine(replace(loaded, config=bank.configure(loaded.config)), retriever, WarmSource(bank))
    plain, begin = engine_generate(Engine(loaded)), [loaded.tokenizer.bos_id]
    with tempfile.TemporaryDirectory() as name:
        peer = transformers_generate(options.checkpoint, Path(name) / "hf", next(loaded.model.parameters()).dtype)
    for batch in options.batch:
        prompts = prompts_of(retriever.references, batch, options.prompt)
        print(f"\n{loaded.config.training.dtype}, batch {batch}, {options.prompt} tokens in, {options.new} out, "
              f"{torch.get_num_threads()} thread(s); best of {options.rounds}")
        measure({
            "transformers": (peer, [begin + one for one in prompts]),
            "no memory": (plain, prompts),
            "memory": (engine_generate(memory), prompts),
            "references as text": (plain, with_texts(retriever, prompts, loaded.config.memory.chunk_length)),
        }, options)


def measure(calls: dict[str, tuple[Generate, list[list[int]]]], options: argparse.Namespace) -> None:
    """Run all in turn, and print tokens a CPU second, times of the phases, and how much faster than the first two."""
    best: dict[tuple[str, int], float] = {}
    found = {}
    for _ in range(options.rounds):
        for name, (generate, prompts) in calls.items():
            for new in (1, options.new):
                begin = time.process_time()
                found[name] = generate(prompts, new)
                best[name, new] = min(best.get((name, new), float("inf")), time.process_time() - begin)
    whole = {name: best[name, options.new] for name in calls}
    prefill = {name: best[name, 1] for name in calls}
    step = {name: (whole[name] - prefill[name]) / (options.new - 1) for name in calls}
    print(f"{'':<20}{'prompt':>7}{'tokens/CPU s':>14}{'prefill ms':>12}{'step ms':>9}   / transformers: {'all':>6}"
          f"{'prefill':>9}{'step':>7}   / no memory: {'all':>6}")
    for name, (_, prompts) in calls.items():
        ratios = [peer["transformers"] / peer[name] for peer in (whole, prefill, step)]
        print(f"{name:<20}{len(prompts[0]):>7}{len(prompts) * options.new / whole[name]:>14,.1f}"
              f"{1e3 * prefill[name]:>12,.0f}{1e3 * step[name]:>9,.1f}{ratios[0]:>25.3f}{ratios[1]:>9.3f}"
              f"{ratios[2]:>7.3f}{whole['no memory'] / whole[name]:>22.3f}", flush=True)
    same = sum(one == other for one, other in zip(found["transformers"], found["no memory"], strict=True))
    print(f"memory / references as text: {whole['references as text'] / whole['memory']:.3f}; "
          f"{same} of {len(found['memory'])} texts are those of transformers, token for token", flush=True)


if __name__ == "__main__":
    main()
