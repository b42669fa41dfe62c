"""`m3 convert verify A B`: the same tensors, logits, greedy tokens and token ids, and a check that notices a fault.

A and B are each a Hugging Face folder, a GGUF file, or a checkpoint. Exit status 1 tells that they differ. At other
layouts: `torchrun --nproc-per-node 3 -m ckpt_convert.verify A B --tensor 3`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_convert.words import parse_words
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    import torch

    from ckpt_convert.sides import Side
    from ckpt_convert.sources import Source

GREEDY_TOKENS = 64
RANDOM_TOKENS = 48
PROMPT = "The river rises in the mountains, and before it reaches the sea, "
TEXTS = (
    PROMPT, "", " two  spaces\n\n\tand a tab", "1234567.89 + 10^-3 = 0x1F", "It's we'll they'd I'm",
    "Größe, naïve, Łódź, façade", "日本語と中文と한국어", "Привет, мир", "مرحبا بالعالم", "👩‍🚀🎉",
    "def f(x):\n    return x**2  # square", "CamelCase snake_case UPPER https://example.org/a?b=c",
)
"""What both tokenizers must encode alike."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to compare, and how strictly."""

    a: str
    """Hugging Face folder, GGUF file, checkpoint, or the folder of a run."""
    b: str
    """What it should equal."""
    tolerance: float = 1e-4
    """Largest absolute difference of logits, computed in fp32."""
    tensor: int = 1
    """Tensor-parallel processes of our models."""
    pipeline: int = 1
    """Pipeline stages of our models."""
    json: bool = False
    """Print the table as JSON."""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance={self.tolerance}: must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table."""

    check: str
    result: str
    passed: bool


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print the table, and exit with status 1 if a line of it failed."""
    options = parse_words(VerifyOptions, argv, "m3 convert verify", __doc__ or "", ("a", "b"))
    from megatron_m3.platform import select

    select()
    from ckpt_convert.sides import is_first, open_side
    from ckpt_convert.sources import is_checkpoint

    # ours first: they join the world, which then tells who compares
    order = sorted((options.a, options.b), key=lambda path: not is_checkpoint(Path(path)))
    sides = {path: open_side(Path(path), options.tensor, options.pipeline) for path in order}
    findings = verify(sides[options.a], sides[options.b], options.tolerance)
    if is_first():
        if options.json:
            json.dump([asdict(finding) for finding in findings], sys.stdout, indent=2)
            print()
        else:
            for finding in findings:
                print(f"{finding.check:<16}{finding.result:<72}{'ok' if finding.passed else 'FAILED'}")
    _leave()
    if not all(finding.passed for finding in findings):
        sys.exit(1)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        from megatron_m3.platform.distributed import shut_down

        shut_down()


def verify(one: "Side", other: "Side", tolerance: float) -> list[Finding]:
    """All checks, the broken mapping last; a collective. The findings are the same on all processes."""
    from ckpt_convert.mapping import their_shapes
    from ckpt_convert.sides import TheirSide, first_rank, is_first
    from ckpt_convert.sources import Swapped

    findings = []
    if is_first():
        findings += [compare_tensors(one.source, other.source), compare_tokenizers(one, other)]
    if their_shapes(one.source.model) != their_shapes(other.source.model):
        return first_rank(findings)
    # transformers generates where it is there: another implementation, with its own cache
    speaker, listener = (other, one) if isinstance(other, TheirSide) else (one, other)
    texts = [(prompt, speaker.generate(prompt, GREEDY_TOKENS)) for prompt in prompts(one)]
    expected = [speaker.logits([*prompt, *answer]) for prompt, answer in texts]
    found = [listener.logits([*prompt, *answer]) for prompt, answer in texts]
    listener.exchange_gate_and_up()
    broken = [listener.logits([*prompt, *answer]) for prompt, answer in texts]
    if is_first():
        difference, agreeing = compare_logits(expected, found), greedy_agreement(texts, found)
        findings.append(Finding(check="logits", passed=difference <= tolerance,
                                result=f"largest difference {difference:.2e}, allowed {tolerance:.0e}"))
        total = GREEDY_TOKENS * len(texts)
        findings.append(Finding(check="greedy tokens", passed=agreeing == total,
                                result=f"{agreeing} of {total} equal, after {len(texts)} prompts"))
        tensors = compare_tensors(one.source, Swapped(other.source), only=".mlp.gate_proj.")
        difference = compare_logits(expected, broken)
        findings.append(Finding(
            check="broken mapping", passed=not tensors.passed and not difference <= tolerance,
            result=f"gate and up exchanged: {tensors.result}, logits {difference:.2e}",
        ))
    return first_rank(findings)


def compare_tensors(one: "Source", other: "Source", *, only: str = "") -> Finding:
    """Whether two models hold the same tensors, bit for bit; a wider type that holds the same numbers is equal.

    ``only`` limits the comparison to tensors whose name has this in it.
    """
    import torch

    from ckpt_convert.mapping import their_shapes
    from megatron_m3.platform.progress import Progress

    shapes, others = their_shapes(one.model), their_shapes(other.model)
    if shapes != others:
        name = next(name for name in (*shapes, *others) if shapes.get(name) != others.get(name))
        return Finding(check="tensors", passed=False,
                       result=f"{name}: {shapes.get(name, 'none')} and {others.get(name, 'none')}")
    if one.model != other.model and (field := _different_field(one, other)):
        return Finding(check="tensors", passed=False, result=f"the models differ in {field}")
    different: set[str] = set()
    names = [name for name in shapes if only in name]
    with Progress("compare", len(names), "tensors") as progress:
        for name in names:
            for first, last, rows in one.bands(name):
                theirs = other.rows(name, first, last)
                wide = torch.promote_types(torch.promote_types(rows.dtype, theirs.dtype), torch.float32)
                if not rows.to(wide).view(torch.int32).equal(theirs.to(wide).view(torch.int32)):
                    different.add(name)
                    break
            progress.advance()
    equal = len(names) - len(different)
    return Finding(check="tensors", passed=not different, result=f"{equal} of {len(names)} equal bit for bit")


def _different_field(one: "Source", other: "Source") -> str | None:
    """The first setting that changes a model's numbers and differs."""
    import dataclasses

    free = ("vocab_multiple", "init_std", "attention", "max_positions")
    for field in dataclasses.fields(one.model):
        mine, theirs = getattr(one.model, field.name), getattr(other.model, field.name)
        unused = field.name.startswith("rope_") and one.model.rope_scaling == other.model.rope_scaling == "none"
        if mine != theirs and field.name not in free and not (unused and field.name != "rope_theta"):
            return f"{field.name}: {mine} and {theirs}"
    return None


def compare_tokenizers(one: "Side", other: "Side") -> Finding:
    """Whether both tokenizers give the same ids, no special tokens added."""
    mine, theirs = one.encode(TEXTS), other.encode(TEXTS)
    if mine is None or theirs is None:
        return Finding(check="tokenizer", passed=True, result="not compared: only one has a tokenizer")
    wrong = [text for text, left, right in zip(TEXTS, mine, theirs, strict=True) if left != right]
    result = f"{len(TEXTS) - len(wrong)} of {len(TEXTS)} texts encoded alike"
    return Finding(check="tokenizer", passed=not wrong, result=result + (f", not {wrong[0]!r}" if wrong else ""))


def prompts(side: "Side") -> list[list[int]]:
    """Token ids to continue: a text, if there is a tokenizer, and random ids."""
    import torch

    from ckpt_convert.sides import first_rank, is_first

    ids: list[list[int]] = []
    if is_first():
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(side.source.model.vocab_size, (RANDOM_TOKENS,), generator=generator).tolist()]
        ids += side.encode([PROMPT]) or []
    return first_rank(ids)


def compare_logits(expected: "Sequence[torch.Tensor]", found: "Sequence[torch.Tensor]") -> float:
    """Largest absolute difference; nan where one is nan."""
    import torch

    return float(torch.stack([(mine - other).abs().max() for mine, other in zip(expected, found, strict=True)]).max())


def greedy_agreement(texts: Sequence[tuple[list[int], list[int]]], logits: "Sequence[torch.Tensor]") -> int:
    """Tokens of the answers that are the likeliest ones by ``logits``: all, if and only if greedy answers are equal."""
    return sum(
        int(logits_SV[len(prompt) - 1 + place].argmax()) == token
        for (prompt, answer), logits_SV in zip(texts, logits, strict=True)
        for place, token in enumerate(answer)
    )


if __name__ == "__main__":
    exit_on_user_error(main)
