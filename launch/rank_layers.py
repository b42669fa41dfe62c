"""`m3 memory rank-layers`: which layers and kv heads read memories with the most gain, and which to give a bank.

    m3 memory rank-layers --checkpoint run --input lines.jsonl --output ranking.json --num-layers 15
    m3 memory rank-layers --checkpoint run --input lines.jsonl --output ranking.json --bytes 50000 --tokens 8

Layers, then single heads, are left out one after another, the least missed first, by real losses of the lines; at the
end some are exchanged. Nothing is trained. Score the proposal on other lines than those it was found with.
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.score import check_output
from megatron_m3.config import parse, replace_fields
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    from megatron_m3.config import Config
    from megatron_m3.evaluation.layer_ranking import Choice


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What is measured, and the budget of the proposal."""

    checkpoint: str
    """Checkpoint, or the folder of a run, whose newest one is taken."""
    input: str
    """JSONL file: {"id", "context", "target", "references": [...]} a line, as for m3 score."""
    output: str
    """JSON file to write: what each layer and head saves, and the proposal."""
    plot: str = ""
    """PNG file to write; none by default."""
    num_layers: int | None = None
    """Layers to propose, and as many heads as they have; this or --bytes."""
    bytes: int | None = None
    """Most bytes of a reference's record in a bank; this or --num-layers."""
    tokens: str | None = None
    """Kept tokens of a record: a number, or all; by default the checkpoint's. Losses are measured with
    --measured-tokens."""
    codec: str = "none"
    """Codec of a record: none (bf16 numbers), KLT and a number, or a FAISS factory string."""
    measured_tokens: str = "all"
    """Tokens kept of a reference while losses are measured: a number, or all. A model that has not been trained to read
    sparse memories shows what its layers are for with all."""
    lines: int = 48
    """Lines that are measured, drawn uniformly; 0 takes all."""
    heads: bool = True
    """Rank single kv heads too."""
    share: float = 0.15
    """Share of the remaining layers or heads that is left out at once, at least one."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Numbers to compute with."""
    seed: int = 1234
    """Draws the lines."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        if (self.num_layers is None) == (self.bytes is None):
            raise ConfigError("num_layers: give either it or bytes, the budget of the proposal")
        for name, least in (("num_layers", 1), ("bytes", 1), ("lines", 0), ("seed", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share}: must be above 0 and below 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the result, print it."""
    options = parse(RankOptions, argv, "m3 memory rank-layers", __doc__ or "")
    result = rank(options)
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(describe(result)))


def rank(options: RankOptions) -> dict[str, Any]:
    """Write and return what each layer and head saves, and the proposal; layers are written before heads are ranked."""
    from megatron_m3.platform import select

    select()
    import numpy as np

    from megatron_m3.evaluation.examples import read_examples
    from megatron_m3.evaluation.gated_reading import GatedReading
    from megatron_m3.evaluation.ranking_plot import plot_ranking
    from megatron_m3.manifest import atomic_path, hash_file
    from megatron_m3.memory.codecs import token_bytes
    from megatron_m3.model.checkpoint import load_model
    from megatron_m3.platform.progress import Progress

    started = time.perf_counter()
    check_output(options.output, options.input)
    loaded = load_model(Path(options.checkpoint), dtype=options.dtype)
    size = RecordSize.of(loaded.config, options.tokens, token_bytes(options.codec, loaded.config.model.head_size))
    num_layers, num_heads = size.targets(options)
    config = replace_fields(loaded.config, {"memory.tokens": options.measured_tokens})
    examples = read_examples(Path(options.input), loaded.tokenizer, reads_references=True,
                             reference_length=config.memory.reference_length)
    if 0 < options.lines < len(examples):
        drawn = np.random.default_rng(options.seed).choice(len(examples), options.lines, replace=False)
        examples = [examples[place] for place in np.sort(drawn)]
    with Progress("encode", len(examples), "lines") as progress:
        reading = GatedReading(replace(loaded, config=config), examples, done=progress.advance)
    none = reading.loss(reading.settled)
    shape = (config.model.num_layers, config.model.num_kv_heads)
    result: dict[str, Any] = {
        "weights_hash": loaded.weights_hash, "input_hash": hash_file(Path(options.input))["sha256"],
        "options": asdict(options), "lines": len(examples), "target_tokens": reading.num_tokens,
        "loss_without_memory": none, "heads": None,
    }

    def write(layers: "Choice", heads: "Choice | None") -> None:
        result["layers"] = _layer_result(layers, size) | size.of_lists(len(layers.units) * size.num_heads)
        result["heads"] = _head_result(heads) | size.of_lists(len(heads.units)) if heads else None
        result["seconds"] = round(time.perf_counter() - started, 1)
        with atomic_path(Path(options.output)) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if options.plot:
            plot_ranking(Path(options.plot), layers, heads, shape)

    layers = _choose(reading, num_layers, options, by_head=False)
    write(layers, None)
    if options.heads:
        write(layers, _choose(reading, num_heads, options, by_head=True))
    return result


def _choose(reading: Any, target: int, options: RankOptions, *, by_head: bool) -> "Choice":
    from megatron_m3.evaluation.layer_ranking import Ranking
    from megatron_m3.platform.progress import Progress

    progress = Progress("heads" if by_head else "layers", 0, "passes")
    ranking = Ranking(reading, by_head=by_head, share=options.share, done=progress.advance)
    progress.total = ranking.planned_passes(target)
    with progress:
        choice = ranking.choose(target)
        progress.total = progress.count
    return choice


@dataclass(frozen=True, kw_only=True)
class RecordSize:
    """Bytes of a reference by how many pairs of a layer and a head hold its memory."""

    num_layers: int
    num_heads: int
    kept: int
    token_bytes: int
    """Bytes of one key and value."""

    @classmethod
    def of(cls, config: "Config", tokens: str | None, token_bytes: int) -> "RecordSize":
        """Of a model, with ``tokens`` kept tokens (its own by default)."""
        memory = replace(config.memory, tokens=tokens or config.memory.tokens)
        return cls(num_layers=config.model.num_layers, num_heads=config.model.num_kv_heads,
                   kept=memory.num_kept_tokens, token_bytes=token_bytes)

    def of_lists(self, count: int) -> dict[str, int]:
        """Bytes of keys and values alone, and of the record."""
        from megatron_m3.memory.record import record_bytes

        return {"key_value_bytes": count * self.kept * self.token_bytes,
                "record_bytes": record_bytes(self.num_heads, count, self.kept, self.token_bytes)}

    def targets(self, options: RankOptions) -> tuple[int, int]:
        """How many layers and how many heads the budget allows.

        Raises:
            ConfigError: not one layer, or more than the model has.
        """
        if options.num_layers is not None:
            if options.num_layers > self.num_layers:
                raise ConfigError(f"num_layers={options.num_layers}: the model has {self.num_layers}")
            return options.num_layers, options.num_layers * self.num_heads
        fixed, one = self.of_lists(0)["record_bytes"], self.of_lists(1)["record_bytes"]
        lists = min((int(options.bytes or 0) - fixed) // (one - fixed), self.num_layers * self.num_heads)
        if lists < self.num_heads:
            raise ConfigError(
                f"bytes={options.bytes}: one layer takes {self.of_lists(self.num_heads)['record_bytes']:,} with "
                f"{self.kept} kept tokens; give more bytes, fewer tokens or a codec"
            )
        return lists // self.num_heads, lists


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending layers as memory.layers takes them, such as 8-10,12."""
    runs = itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    spans = [[layer for _, layer in run] for _, run in runs]
    return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def _layer_result(choice: "Choice", size: RecordSize) -> dict[str, Any]:
    return {"memory_layers": layer_ranges([unit[0] for unit in choice.units]), "loss": choice.loss,
            "saves": [choice.saves[(layer,)] for layer in range(size.num_layers)], "path": choice.path}


def _head_result(choice: "Choice") -> dict[str, Any]:
    by_layer = itertools.groupby(choice.units, lambda unit: unit[0])
    spec = ";".join(f"{layer}:{','.join(str(unit[1]) for unit in units)}" for layer, units in by_layer)
    saves = [{"layer": unit[0], "head": unit[1], "saves": value} for unit, value in sorted(choice.saves.items())]
    layers = layer_ranges(sorted({unit[0] for unit in choice.units}))
    return {"memory_layers": layers, "memory_heads": spec, "loss": choice.loss, "saves": saves, "path": choice.path}


def describe(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    layers, heads = result["layers"], result["heads"]
    lines = [
        f"{result['lines']} lines, {result['target_tokens']:,} target tokens, "
        f"{result['options']['measured_tokens']} tokens kept; nats per token",
        f"  without memory           {result['loss_without_memory']:.4f}",
        *(f"  {count:>3} layers               {loss:.4f}" for count, loss in layers["path"]),
        "what each layer saves:",
        *(f"  layer {layer:>2}  {value:+.4f}" for layer, value in enumerate(layers["saves"])),
        f"proposal: --memory.layers {layers['memory_layers']}   loss {layers['loss']:.4f}, "
        f"{layers['key_value_bytes']:,} bytes of keys and values a reference, record {layers['record_bytes']:,}",
    ]
    if heads:
        lines.append(
            f"by head:  --memory.layers {heads['memory_layers']} --memory.heads '{heads['memory_heads']}'   "
            f"loss {heads['loss']:.4f}, "
            f"{heads['key_value_bytes']:,} bytes of keys and values a reference, record {heads['record_bytes']:,}"
        )
    return [*lines, f"{result['seconds']:.0f} s; all of it in {result['options']['output']}"]


if __name__ == "__main__":
    exit_on_user_error(main)
