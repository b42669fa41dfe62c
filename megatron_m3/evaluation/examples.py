"""The lines that are scored: a context, a target and references each, checked before anything is computed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_m3.errors import DataError
from megatron_m3.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line, tokenized part by part without special tokens."""

    line: int
    """Its number in the file, from 1."""
    id: str | int
    context: list[int]
    target: list[int]
    references: list[list[int]]


def read_examples(path: Path, tokenizer: Tokenizer, *, reads_references: bool, reference_length: int) -> list[Example]:
    """Read and check every line of a JSONL file.

    Args:
        path: lines ``{"id", "context", "target", "references": [...]}``; blank ones are skipped.
        tokenizer: encodes each part by itself.
        reads_references: whether references become memories: there must be some, none longer than the limit.
        reference_length: most tokens in a reference.

    Raises:
        DataError: names the file and the line.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give a JSONL file as --input")
    examples = []
    for number, raw in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if raw.strip():
            example = _parse(raw, f"{path}, line {number}", number, tokenizer)
            if reads_references:
                _check_references(example, f"{path}, line {number}", reference_length)
            examples.append(example)
    if not examples:
        raise DataError(f"{path}: no lines; give at least one example")
    return examples


def _parse(raw: bytes, where: str, number: int, tokenizer: Tokenizer) -> Example:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply; write one flat object a line") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); write one object a line") from None
    if not isinstance(fields, dict):
        raise DataError(f'{where}: not an object; write {{"id", "context", "target", "references"}}')
    if not isinstance(fields.get("id"), str | int) or isinstance(fields.get("id"), bool):
        raise DataError(f"{where}: id is missing, or neither text nor a whole number")
    references = fields.get("references", [])
    if not isinstance(references, list):
        raise DataError(f"{where}: references is not a list of texts")
    texts = [_text(fields.get(name), f"{where}: {name}") for name in ("context", "target")]
    texts += [_text(text, f"{where}: reference {place}") for place, text in enumerate(references, 1)]
    context, target, *encoded = tokenizer.encode_batch(texts)
    if not target:
        raise DataError(f"{where}: target is empty; there is nothing to score")
    return Example(line=number, id=fields["id"], context=context, target=target, references=encoded)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is missing, or not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a surrogate pair, which is no character; mend the escape") from None
    return value


def _check_references(example: Example, where: str, reference_length: int) -> None:
    if not example.references:
        raise DataError(f"{where}: references is empty; this mode reads at least one, score it with --mode none")
    for place, reference in enumerate(example.references, 1):
        if not reference:
            raise DataError(f"{where}: reference {place} is empty; remove it")
        if len(reference) > reference_length:
            raise DataError(
                f"{where}: reference {place} has {len(reference)} tokens, the limit is {reference_length} "
                "(memory.reference_length); cut it into several references"
            )


def exchange_references(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every example with another one's references: a random cycle through all of them, the same for the same seed.

    Raises:
        DataError: a single example, which has no other.
    """
    if len(examples) < 2:
        raise DataError("mode shuffled: needs at least two lines, so that each can have another's references")
    order = np.random.default_rng(seed).permutation(len(examples))
    donor = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [replace(one, references=examples[donor[place]].references) for place, one in enumerate(examples)]
