"""Loss against bytes per reference: the same lines scored in many ways, block by block into a file that grows.

A *point* is one way to give a model the references: as explicit memory with some settings and a codec, as another
line's memory, as text, or not at all. A *block* is some consecutive lines of the input. The references of a batch are
encoded once for all points.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from megatron_m3.config import Config, replace_fields
from megatron_m3.errors import ConfigError, DataError
from megatron_m3.evaluation.examples import Example, exchange_references, read_examples
from megatron_m3.evaluation.scoring import CodecSample, Mode, Scorer, distinct_references, encode_texts
from megatron_m3.manifest import hash_file
from megatron_m3.memory import Codec, ExplicitMemories
from megatron_m3.memory.codecs import check_codec, token_bytes
from megatron_m3.memory.record import record_bytes
from megatron_m3.model.checkpoint import LoadedModel
from megatron_m3.platform.progress import Progress

BLOCK_LINES = 50
"""Lines in a block: what an interrupted run may lose."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to give the references."""

    mode: Mode
    codec: str
    memory: tuple[tuple[str, str], ...]
    """Fields of the config's memory section, by name."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """A point from ``none``, ``text`` or settings such as ``layers=8-24,tokens=8,codec=PQ16x8,mode=shuffled``.

        Raises:
            ConfigError: not settings.
        """
        if text in ("none", "text"):
            return cls(mode=text, codec="none", memory=())  # type: ignore[arg-type]
        parts = re.split(r",(?=[a-z_]+=)", text)
        fields = dict(part.split("=", 1) for part in parts if "=" in part)
        if len(fields) != len(parts) or ",," in text:
            raise ConfigError(f"points: {text} is neither none, text nor settings; write layers=8-24,tokens=8")
        mode: Any = fields.pop("mode", "explicit")
        if mode not in ("explicit", "shuffled"):
            raise ConfigError(f"points: mode={mode}: choose explicit or shuffled; none and text stand alone")
        return cls(mode=mode, codec=fields.pop("codec", "none"), memory=tuple(sorted(fields.items())))

    @property
    def name(self) -> str:
        """The point as :meth:`parse` takes it, in one order."""
        if self.mode in ("none", "text"):
            return self.mode
        extra = [("codec", self.codec)] * (self.codec != "none") + [("mode", self.mode)] * (self.mode == "shuffled")
        return ",".join(f"{name}={value}" for name, value in (*self.memory, *extra)) or "checkpoint"

    def config(self, config: Config) -> Config:
        """A checkpoint's config with this point's memory settings."""
        return replace_fields(config, {f"memory.{name}": value for name, value in self.memory})


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of one reference's memory."""

    key_values: int
    """Codes of its keys and values alone."""
    record: int
    """Its record in a bank."""

    @classmethod
    def of(cls, config: Config, token_bytes: int) -> Self:
        """Of a full reference, with ``token_bytes`` for the key and value of a kept token."""
        lists, kept = sum(map(len, config.memory_heads.values())), config.memory.num_kept_tokens
        return cls(key_values=lists * kept * token_bytes,
                   record=record_bytes(config.model.num_kv_heads, lists, kept, token_bytes))


class ResultFile:
    """JSON lines, one for each point and block of a checkpoint and an input; lines are only ever added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        raw = path.read_bytes() if path.exists() else b""
        whole, _, torn = raw.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}, line {number}: not a result of m3 memory frontier; name another") from None
        if torn:  # a run was killed while it wrote its last line
            with path.open("r+b") as stream:
                stream.truncate(len(raw) - len(torn))

    def add(self, row: dict[str, Any]) -> None:
        """Append one row and keep it on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self.rows[row["key"]] = row


class Frontier:
    """The points of one checkpoint on one input."""

    def __init__(
        self, loaded: LoadedModel, points: Sequence[Point], examples: Sequence[Example],
        calibration: Sequence[Example], *, seed: int, identity: Sequence[str], label: str,
    ) -> None:
        """``calibration`` holds the references that codecs are trained on; ``identity`` names checkpoint and inputs."""
        self.loaded, self.points, self.seed, self.label = loaded, points, seed, label
        self.identity, self.calibration = identity, calibration
        self.examples: dict[str, Sequence[Example]] = {"explicit": examples}
        if any(point.mode == "shuffled" for point in points):
            self.examples["shuffled"] = exchange_references(examples, seed)
        self.scorers = {
            point: Scorer(replace(loaded, config=point.config(loaded.config)), point.mode) for point in points
        }
        for mode, scorer in {point.mode: scorer for point, scorer in self.scorers.items()}.items():
            scorer.warn_of_long(self.examples["shuffled" if mode == "shuffled" else "explicit"])
        self.samples: dict[tuple[tuple[str, str], ...], CodecSample] = {}

    @classmethod
    def open(
        cls, loaded: LoadedModel, points: Sequence[Point], input: Path, calibration: Path, *, lines: int, seed: int,
        label: str,
    ) -> Self:
        """The points of a checkpoint on the first ``lines`` of a JSONL file (0: all), checked before anything is run.

        Raises:
            M3Error: a codec that there is not, or a line that cannot be read.
        """
        for point in points:
            check_codec(point.codec, point.config(loaded.config).model.head_size)
        reads = any(point.mode in ("explicit", "shuffled") for point in points)
        paths, length = (input, calibration), loaded.config.memory.reference_length
        examples, others = (
            read_examples(path, loaded.tokenizer, reads_references=reads, reference_length=length) for path in paths
        )
        identity = [loaded.weights_hash[:16], *(hash_file(path)["sha256"][:16] for path in paths),
                    loaded.config.training.dtype]
        return cls(loaded, points, examples[: lines or None], others, seed=seed, identity=identity, label=label)

    def blocks(self) -> list[range]:
        """Places of the lines of each block."""
        count = len(self.examples["explicit"])
        return [range(first, min(first + BLOCK_LINES, count)) for first in range(0, count, BLOCK_LINES)]

    def key(self, point: Point, block: range) -> str:
        """What names a row: checkpoint, inputs, settings and lines."""
        memory = json.dumps(asdict(self.scorers[point].config.memory), sort_keys=True)
        # whose references a line gets depends on how many lines there are
        drawn = f"{self.seed} {len(self.examples['explicit'])}" if point.mode == "shuffled" else f"{self.seed}"
        settings = hashlib.sha256(f"{memory} {drawn}".encode()).hexdigest()[:16]
        return " ".join([*self.identity, settings, point.name, f"{block.start}-{block.stop}"])

    def missing(self, results: ResultFile) -> list[tuple[range, list[Point]]]:
        """Blocks with the points that they lack."""
        lacking = [(block, [point for point in self.points if self.key(point, block) not in results.rows])
                   for block in self.blocks()]
        return [(block, points) for block, points in lacking if points]

    def run(self, results: ResultFile, done: Callable[[int], None]) -> None:
        """Score what is missing; ``done(n)`` is told of every n lines that a point has finished."""
        for block, points in self.missing(results):
            for mode in ("explicit", "shuffled"):
                some = [point for point in points if (point.mode == "shuffled") == (mode == "shuffled")]
                if some:
                    self._run_block([self.examples[mode][place] for place in block], some, block, results, done)

    def _run_block(
        self, examples: Sequence[Example], points: Sequence[Point], block: range, results: ResultFile,
        done: Callable[[int], None],
    ) -> None:
        """Score some lines in every one of ``points``, which read the same references."""
        for point in points:
            self.codec(point)
        sums: dict[Point, dict[int, float]] = {point: {} for point in points}
        readers = [point for point in points if self.scorers[point].reads_memories]
        if readers:
            for places in self.scorers[readers[0]].batches(examples):
                batch = [examples[place] for place in places]
                for point, memories in zip(readers, self._encode(batch, readers), strict=True):
                    scores = self.scorers[point].score_batch(batch, memories)
                    sums[point].update(zip(places, [score.nll for score in scores], strict=True))
                    done(len(batch))
        for point in points:
            if point not in readers:
                scores = self.scorers[point].score(examples, done)
                sums[point].update(enumerate(score.nll for score in scores))
            results.add(self._row(point, block, [sums[point][place] for place in range(len(examples))], examples))

    def _encode(self, batch: Sequence[Example], points: Iterable[Point]) -> list[ExplicitMemories]:
        """Memories of a batch for each point, encoded once; points with the same settings share them."""
        configs = {point.memory: self.scorers[point].config for point in points}
        variants = encode_texts(self.loaded, distinct_references(batch), list(configs.values()))
        by_settings = dict(zip(configs, variants, strict=True))
        return [by_settings[point.memory] for point in points]

    def codec(self, point: Point) -> Codec | None:
        """The codec through which a point reads memories, trained when first asked for; None for the codec none."""
        scorer = self.scorers[point]
        if point.codec != "none" and scorer.codec is None:
            with Progress(f"{point.name}: train", 1, "codec") as progress:
                if point.memory not in self.samples:
                    self.samples[point.memory] = scorer.draw_sample(self.calibration, self.seed)
                scorer.train_codec(point.codec, self.samples[point.memory])
                progress.advance()
        return scorer.codec

    def _row(self, point: Point, block: range, nll: list[float], examples: Sequence[Example]) -> dict[str, Any]:
        scorer = self.scorers[point]
        size = None
        if scorer.reads_memories:
            name = scorer.codec.name if scorer.codec else "none"
            size = asdict(Bytes.of(scorer.config, token_bytes(name, scorer.config.model.head_size)))
        return {"key": self.key(point, block), "checkpoint": self.label, "point": point.name, "mode": point.mode,
                "bytes": size, "nll": [round(one, 5) for one in nll], "tokens": [len(one.target) for one in examples]}


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """The loss of one point over all lines."""

    checkpoint: str
    point: str
    mode: str
    key_value_bytes: int | None
    record_bytes: int | None
    lines: int
    tokens: int
    nats_per_token: float
    standard_error: float
    """Of nats_per_token over draws of lines."""


def collect(frontier: Frontier, results: ResultFile) -> list[PointResult]:
    """The finished points of a frontier."""
    found = []
    for point in frontier.points:
        rows = [results.rows[frontier.key(point, block)] for block in frontier.blocks()]
        nll, tokens = ([value for row in rows for value in row[name]] for name in ("nll", "tokens"))
        size, (loss, error) = rows[0]["bytes"] or {}, per_token(nll, tokens)
        found.append(PointResult(
            checkpoint=frontier.label, point=point.name, mode=point.mode, key_value_bytes=size.get("key_values"),
            record_bytes=size.get("record"), lines=len(nll), tokens=sum(tokens), nats_per_token=loss,
            standard_error=error,
        ))  # fmt: skip
    return found


def per_token(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """The mean over tokens of what lines sum up to, and its standard error over draws of lines."""
    total = sum(tokens)
    mean = sum(sums) / total
    return mean, sum((one - mean * count) ** 2 for one, count in zip(sums, tokens, strict=True)) ** 0.5 / total
