"""m3 data filter: keep documents by rules of their words, by language, and by a quality model of your own.

A document is dropped by the first thing against it, in that order; `dropped/` lists each with the reason and the value.
Kept documents get the columns `language` and, with a quality model, `quality`. Any number of jobs may run the same
command at once. The quality model is a function of a list of texts that returns a score from 0 to 1 for each.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.document_store import KIND, SCHEMA, DocumentFolder, DocumentStore, is_made, show
from data_tools.rules import Rules
from data_tools.shared_work import Workers
from data_tools.words import split_words
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import hash_file

if TYPE_CHECKING:
    import pyarrow

type Scorer = Callable[[list[str]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: str
    """Folder of documents, made by `m3 data collect`."""
    output: str
    """Folder to write."""
    rules: Rules = field(default_factory=Rules)
    languages: tuple[str, ...] = ("en", "zh")
    """Languages to keep, ISO 639 codes; empty keeps all and does not ask the model."""
    min_language: float = 0.5
    """Least probability of the language."""
    language_characters: int = 1000
    """Characters of a document that its language is told by."""
    quality: str = ""
    """A quality model, as module:function."""
    min_quality: float = 0.5
    """Least score of the quality model."""
    workers: int = 1
    """Processes here; more jobs of the same command, on any machine, share the blocks too."""

    def __post_init__(self) -> None:
        for name in ("min_language", "min_quality"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        for name in ("language_characters", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


def run(options: Options) -> None:
    """Write the blocks that are missing, then the manifest."""
    store, output = DocumentStore.open(options.input), Path(options.output)
    inputs, settings = {"documents": store.hash}, settings_of(options)
    if options.languages:
        from data_tools.languages import model_path

        inputs["language_model"] = hash_file(model_path())["sha256"]
    if options.quality:
        inputs["quality_model"] = hash_file(Path(str(load_scorer(options.quality)[1].__file__)))["sha256"]
    if is_made(output, inputs, settings):
        return
    folder = DocumentFolder(output, {"kind": KIND, "schema": SCHEMA, "inputs": inputs, "settings": settings})
    with Workers(options.workers) as workers:
        do = functools.partial(write_block, folder, store, options)
        workers.run("filtering", folder, store.sizes, "documents", do)
    show("filtered", output, folder.finish(len(store.sizes), inputs, settings))


def settings_of(options: Options) -> dict[str, Any]:
    """What shapes the output."""
    unused = {"input", "output", "workers"} | (set() if options.quality else {"quality", "min_quality"})
    return {"step": "filter"} | {name: list(value) if isinstance(value, tuple) else value
                                 for name, value in asdict(options).items() if name not in unused}


@functools.cache
def load_scorer(name: str) -> tuple[Scorer, Any]:
    """The quality model ``module:function``, and its module.

    Raises:
        ConfigError: there is no such function.
    """
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"quality={name}: {error}; give module:function of an importable module") from None
    if not callable(found) or getattr(module, "__file__", None) is None:
        raise ConfigError(f"quality={name}: not a function of a module that is a file; give module:function")
    return found, module


def write_block(folder: DocumentFolder, store: DocumentStore, options: Options, index: int) -> None:
    """Write the kept documents of one block."""
    import pyarrow

    added = [*(["language"] if options.languages else []), *(["quality"] if options.quality else [])]
    names = [name for name in store.columns() if name not in added]
    with folder.block(index, [*names, *added]) as writer:
        for batch in store.batches(index):
            kept: list[int] = []
            values: list[list[str]] = [[] for _ in added]
            for row, (reason, value, found) in enumerate(judge(batch.column("text").to_pylist(), options)):
                if reason:
                    entry = {name: batch.column(name)[row].as_py() for name in ("id", "place")}
                    writer.drop(reason, **entry, value=value)
                else:
                    kept.append(row)
                    for column, one in zip(values, found, strict=True):
                        column.append(one)
            writer.write(with_columns(batch.select(names).take(pyarrow.array(kept, pyarrow.int64())), added, values))


def with_columns(
    batch: "pyarrow.RecordBatch", names: Sequence[str], values: Sequence[list[str]]
) -> "pyarrow.RecordBatch":
    """A batch with columns of text added."""
    import pyarrow

    for name, column in zip(names, values, strict=True):
        batch = batch.append_column(name, pyarrow.array(column, pyarrow.large_string()))
    return batch


type Verdict = tuple[str | None, float | str, list[str]]
"""Why a document is dropped (None: it is not), the value that decided, and what the added columns hold."""


def judge(texts: list[str], options: Options) -> Iterator[Verdict]:
    """The verdict on each text."""
    broken = (one for words in split_words(texts) for one in options.rules.broken_by(words))
    verdicts = [judge_alone(text, rule, options) for text, rule in zip(texts, broken, strict=True)]
    if not options.quality:
        yield from verdicts
        return
    left = [row for row, verdict in enumerate(verdicts) if verdict[0] is None]
    returned = load_scorer(options.quality)[0]([texts[row] for row in left]) if left else []
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError):
        scores = [math.nan]
    if len(scores) != len(left) or not all(0 <= score <= 1 for score in scores):
        raise ConfigError(f"quality={options.quality}: must return a score from 0 to 1 for each of its texts")
    for row, score in zip(left, scores, strict=True):
        low = score < options.min_quality
        verdicts[row] = ("low quality", score, []) if low else (None, "", [*verdicts[row][2], f"{score:.6g}"])
    yield from verdicts


def judge_alone(text: str, broken: tuple[str, float] | None, options: Options) -> Verdict:
    """The verdict of rules, of which the text breaks ``broken``, and language."""
    if broken:
        return broken[0], round(broken[1], 4), []
    if not options.languages:
        return None, "", []
    from data_tools.languages import detect

    language, score = detect(text, options.language_characters)
    if language not in options.languages:
        return "other language", language, []
    if score < options.min_language:
        return "language uncertain", round(score, 4), []
    return None, "", [language]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data filter``."""
    run(parse(Options, argv, "m3 data filter", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
