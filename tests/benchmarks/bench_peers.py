"""Generation of a real model beside its peers: transformers, and the same model with the references as text.

    python -m tests.benchmarks.bench_peers --checkpoint RUN --references REFERENCES --index INDEX --bank BANK

Tokens a CPU second, which other processes disturb little, of greedy generation with the same weights in the same type:
transformers' generate (the checkpoint as `m3 convert to-hf` writes it), this engine without memory, with recall from
the bank, and without memory but with the five references of the prompt's last chunk put before it. Prompts are texts of
the references, each beginning elsewhere.
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
    """Measure all in turn and print the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "references", "index", "bank"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("batch", 8), ("prompt", 128), ("new", 128), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of all; by default what it was trained with")
    options = parser.parse_args()
    initialize_parallel(ParallelConfig(), seed=1)
    from megatron_m3.inference.engine import Engine
    from megatron_m3.memory import MemoryBank, WarmSource
    from megatron_m3.model.checkpoint import load_model, newest_checkpoint
    from megatron_m3.retrieval import Retriever

    loaded = load_model(newest_checkpoint(Path(options.checkpoint)), dtype=options.dtype)
    bank = MemoryBank.open(options.bank, weights_hash=loaded.weights_hash)
    retriever = Retriever.open(options.index, options.references, loaded.tokenizer)
    memory = Engine(replace(loaded, config=bank.configure(loaded.config)), retriever, WarmSource(bank))
    prompts = prompts_of(retriever.references, options.batch, options.prompt)
    texts = with_texts(retriever, prompts, loaded.config.memory.chunk_length)
    with tempfile.TemporaryDirectory() as name:
        peer = transformers_generate(options.checkpoint, Path(name) / "hf", next(loaded.model.parameters()).dtype)
        plain = engine_generate(Engine(loaded))
        begin = [loaded.tokenizer.bos_id]
        calls: dict[str, tuple[Generate, list[list[int]]]] = {
            "transformers": (peer, [begin + one for one in prompts]), "no memory": (plain, prompts),
            "memory": (engine_generate(memory), prompts), "references as text": (plain, texts),
        }
        measure(calls, options)
    shut_down()


def measure(calls: dict[str, tuple[Generate, list[list[int]]]], options: argparse.Namespace) -> None:
    """Run all in turn, and print tokens a CPU second and ratios to the first two."""
    seconds, found = dict.fromkeys(calls, float("inf")), {}
    for _ in range(options.rounds):
        for name, (generate, prompts) in calls.items():
            begin = time.process_time()
            found[name] = generate(prompts, options.new)
            seconds[name] = min(seconds[name], time.process_time() - begin)
    print(f"batch {options.batch}, {options.prompt} tokens in, {options.new} out, {torch.get_num_threads()} thread(s); "
          f"best of {options.rounds}")
    print(f"{'':<22}{'prompt':>8}{'tokens/CPU s':>14}{'/ transformers':>16}{'/ no memory':>13}")
    for name, (_, prompts) in calls.items():
        print(f"{name:<22}{len(prompts[0]):>8}{options.batch * options.new / seconds[name]:>14,.1f}"
              f"{seconds['transformers'] / seconds[name]:>16.3f}{seconds['no memory'] / seconds[name]:>13.3f}")
    same = sum(one == other for one, other in zip(found["transformers"], found["no memory"], strict=True))
    print(f"memory / references as text: {seconds['references as text'] / seconds['memory']:.3f}; "
          f"{same} of {options.batch} texts are those of transformers, token for token")


if __name__ == "__main__":
    main()
