"""`m3 generate`: continue prompts with recall every 64 tokens, showing which references each chunk read.

    m3 generate --checkpoint run --references references --index index --bank bank --prompt "The heron is"
    m3 generate --checkpoint run --no-memory --prompt "The heron is"
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.engine import EngineOptions, build_engine
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.inference.generation import Generation, Statistics

FIRST_CHARACTERS = 60
MAX_NEW_TOKENS = 1_000_000
"""The key-value cache holds all of them from the start."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EngineOptions):
    """What to continue, and how tokens are chosen."""

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
        super().__post_init__()


def main(argv: Sequence[str] | None = None) -> None:
    """Continue the prompts and print what was read and written."""
    options = parse(GenerateOptions, argv, "m3 generate", __doc__ or "")
    from megatron_m3.platform import select

    select()
    from megatron_m3.inference.context import warn_beyond_context
    from megatron_m3.inference.generation import Statistics
    from megatron_m3.inference.sampling import Sampling, draws

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    prompts = [options.prompt] if options.prompt is not None else read_prompts(Path(options.input))
    engine, total, results = build_engine(options), Statistics(), []
    ids = engine.loaded.tokenizer.encode_batch(prompts)
    warn_beyond_context(engine.loaded, [1 + len(one) + options.max_new_tokens for one in ids],
                        reads_memories=engine.recall is not None, mend="shorten the prompt or max_new_tokens")
    drawn = draws(sampling, ids)
    for first in range(0, len(prompts), options.batch):
        part = slice(first, first + options.batch)
        found, statistics = engine.generate(prompts[part], options.max_new_tokens, drawn[part])
        total.add(statistics)
        results += found
        if not options.json:
            print("\n\n".join(describe(one) for one in found), end="\n\n")
    if options.json:
        json.dump({"results": [one.to_dict() for one in results], "statistics": total.to_dict()}, sys.stdout, indent=2)
        print()
    else:
        print(summary(total), file=sys.stderr)


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
                prompt = json.loads(raw.decode("utf-8-sig"))["prompt"]
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
