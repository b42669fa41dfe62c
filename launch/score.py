"""`m3 score`: the loss of targets after contexts, with explicit memories, with text in the prompt, or without.

    m3 score --checkpoint run --input lines.jsonl --mode none --output none.jsonl
    m3 score --checkpoint run --input lines.jsonl --mode explicit --output explicit.jsonl

What the first prints less what the second prints is what the memories of the lines' own references save. A line:

    {"id": 1, "context": "The word heron means", "target": " a bird", "references": ["heron: a bird"]}
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_m3.config import parse, replace_fields
from megatron_m3.errors import ConfigError, exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What to score, and how the references are read."""

    checkpoint: str
    """Checkpoint, or the folder of a run, whose newest one is taken."""
    input: str
    """JSONL file: {"id", "context", "target", "references": [...]} a line."""
    output: str
    """JSONL file to write: {"id", "nll", "tokens"} a line, nll in nats over the target."""
    mode: Literal["none", "explicit", "text", "shuffled"]
    """none: BOS, context, target; explicit: they read the references' memories; text: the references stand before
    them as text; shuffled: explicit with another line's references."""
    memory_layers: str | None = None
    """Memory layers, such as 8-24; by default the checkpoint's."""
    memory_heads: str | None = None
    """Memory heads, such as all or 8:0,2;9:1; by default the checkpoint's."""
    memory_tokens: str | None = None
    """Tokens kept of a reference for each key-value head: a number, or all; by default the checkpoint's."""
    codec: str = "none"
    """Codec that memories pass through, trained on those of the input's own references: none, auto, fp8, KLT and a
    number, or a FAISS factory string."""
    seed: int = 1234
    """Which other line's references mode shuffled takes, and the codec's sample."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Numbers to compute with; by default the checkpoint's."""
    batch_tokens: int = 4096
    """Most tokens, padding and references included, in one pass."""
    json: bool = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens={self.batch_tokens}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be 0 or more")
        if self.codec != "none" and self.mode in ("none", "text"):
            raise ConfigError(f"codec={self.codec}: mode {self.mode} reads no memories; leave it out")


def main(argv: Sequence[str] | None = None) -> None:
    """Score every line, write the losses, print the summary."""
    options = parse(ScoreOptions, argv, "m3 score", __doc__ or "")
    summary = score(options)
    if options.json:
        json.dump(summary, sys.stdout, indent=2)
        print()
    else:
        print(
            f"mode {options.mode}: {summary['nats_per_token']:.4f} nats per token over {summary['tokens']:,} tokens of "
            f"{summary['lines']:,} lines, {summary['seconds']:.1f} s; losses in {options.output}"
        )


def score(options: ScoreOptions) -> dict[str, Any]:
    """Write the losses of every line and return the summary; nothing is written if anything is wrong."""
    from megatron_m3.platform import select

    select()
    from megatron_m3.evaluation.examples import exchange_references, read_examples
    from megatron_m3.evaluation.scoring import Scorer
    from megatron_m3.manifest import atomic_path
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.platform.progress import Progress

    started = time.perf_counter()
    check_output(options.output, options.input)
    loaded = load_model(Path(options.checkpoint), dtype=options.dtype)
    given = {"memory.layers": options.memory_layers, "memory.heads": options.memory_heads,
             "memory.tokens": options.memory_tokens}
    config = replace_fields(loaded.config, {name: text for name, text in given.items() if text is not None})
    loaded, memory = replace(loaded, config=config), config.memory
    reads_references = options.mode in ("explicit", "shuffled")
    examples = read_examples(
        Path(options.input),
        loaded.tokenizer,
        reads_references=reads_references,
        reference_length=memory.reference_length,
    )
    if options.mode == "shuffled":
        examples = exchange_references(examples, options.seed)
    scorer = Scorer(loaded, options.mode, batch_tokens=options.batch_tokens)
    scorer.warn_of_long(examples)
    if reads_references and options.codec != "none":
        scorer.train_codec(options.codec, scorer.draw_sample(examples, options.seed))
    with Progress("score", len(examples), "lines") as progress:
        scores = scorer.score(examples, progress.advance)
    with atomic_path(Path(options.output)) as path:
        path.write_text("".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in scores), encoding="utf-8")
    tokens, nll = sum(one.tokens for one in scores), sum(one.nll for one in scores)
    summary: dict[str, Any] = {
        "mode": options.mode,
        "lines": len(scores),
        "tokens": tokens,
        "nll": nll,
        "nats_per_token": nll / tokens,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if reads_references:
        summary |= {
            "memory_layers": list(config.memory_layers),
            "memory_tokens": memory.tokens,
            "codec": options.codec,
        }
    return summary


def check_output(output: str, input: str) -> None:
    """Refuse, before anything is computed, an output that is the input or that could not be written."""
    path = Path(output)
    if not output or (path.exists() and not path.is_file()):
        raise ConfigError(f"output={output}: not the name of a file; name one to write")
    if path.resolve() == Path(input).resolve():
        raise ConfigError(f"output={output}: is the input file, which would be lost; name another file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"output={output}: {parent} is no folder that can be written; choose another")


if __name__ == "__main__":
    exit_on_user_error(main)
