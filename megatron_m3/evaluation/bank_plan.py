"""What a bank build takes before it is begun: bytes on disk and in RAM, FLOPs by the cost model, time."""

import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_m3.config import Config
from megatron_m3.evaluation.codec_time import measure_codec
from megatron_m3.evaluation.cost import TFLOP, format_bytes, write_memory_flops
from megatron_m3.memory.bank_order import BankOrder
from megatron_m3.memory.codec import CPU
from megatron_m3.memory.space import measure_space
from megatron_m3.memory.write import GROUP, GROUPS_IN_RAM
from megatron_m3.platform.progress import format_seconds

CODING_GROUPS = 3
"""Groups of memories whose room the coding of one takes, about."""
TRAINING_SAMPLES = 3
"""Samples of memories whose room the training of a codec takes, about, the sample included."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build takes."""

    output: str
    references: int
    mean_length: float
    """Tokens of a reference, the prefix not counted."""
    codec: str
    token_bytes: int
    """Bytes of the key and the value of one kept token."""
    record_bytes: int
    blocks: int
    missing_blocks: int
    missing_references: int
    shard_bytes: int
    manifest_bytes: int
    """Manifest and the shards' own records."""
    codec_bytes: int
    """About."""
    missing_bytes: int
    """Of the whole bank, what is not there yet."""
    free_bytes: int | None
    """None where the file system does not say."""
    open_shard_bytes: int
    """A rank's shard until it is whole, on disk and in RAM."""
    group_bytes: int
    """RAM for the memories of one group of references; a rank has up to three."""
    sample_references: int
    """References that the codec is still to be trained on."""
    sample_bytes: int
    """RAM for their memories, in rank 0."""
    model_bytes: int
    """RAM for a rank's weights."""
    activation_bytes: int
    """RAM for one pass, about."""
    rank_bytes: int
    """RAM of a rank at its peak, about: model, pass, groups, shard and what every process takes."""
    first_rank_bytes: int
    """The same of rank 0, which trains the codec."""
    sample_flops: float
    write_flops: float
    """Of the missing references, each by its own length."""
    vectors: int
    """Keys and values that the codec is still to encode."""
    ranks: int
    tflops: float
    """TFLOP/s of all ranks."""
    is_measured: bool
    """Whether that was measured on this machine."""
    utilisation: float
    model_seconds: float
    """The FLOPs at that share of the rate."""
    training_seconds: float
    """Training of the codec, by rank 0."""
    vectors_per_second: float
    """Keys and values that a rank codes, on its device, or one thread."""
    is_scaled: bool
    """Whether a smaller codec than the bank's was timed."""
    coding_seconds: float
    """Coding of all keys and values, by all ranks."""
    seconds: float
    """Of all; the model and the codec take turns."""


def plan_build(order: BankOrder[Any], rates: Sequence[float], device: torch.device = CPU) -> BuildPlan:
    """What a build takes on ranks that reach ``rates`` TFLOP/s each; writes nothing.

    Args:
        order: the bank.
        rates: of all ranks, in order.
        device: what a rank computes on, the codec too.

    Raises:
        M3Error: the build would be refused for another reason than a lack of space.
    """
    options, config, settings = order.options, order.loaded.config, order.planned_settings()
    space = measure_space(settings, order.key, order.folder, codec_shared=options.codec_shared)
    sample = order.sample_ids() if not space.has_codec else order.sample_ids()[:0]
    ids = np.concatenate([np.arange(0), *(np.asarray(settings.block(index)) for index in space.missing)])
    lists, kept = int(settings.memory_lists.sum()), settings.num_kept_tokens
    memory_bytes = settings.memory_lists.numel() * kept * (2 * 4 * settings.head_size + 2)
    write, training = (_write_flops(config, order.lengths[chosen]) for chosen in (ids, sample))
    codec = measure_codec(settings, lists * int(np.minimum(order.lengths[sample], kept).sum()), device)
    vectors = 2 * lists * int(np.minimum(order.lengths[ids], kept).sum())
    tflops, groups = sum(rates), len(rates) // options.tensor_parallel
    model_seconds = (write + training) / (tflops * TFLOP * options.plan_utilisation)
    coding_seconds = vectors / codec.vectors_per_second / max(1, groups)
    open_shard = min(settings.block_size, settings.num_references) * settings.record.record_bytes
    group_bytes = min(GROUP, settings.block_size, settings.num_references) * memory_bytes
    model_bytes, activation_bytes = _model_bytes(config, options.tensor_parallel, options.batch_tokens)
    process_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + model_bytes + activation_bytes
    rank_bytes = process_bytes + open_shard + (GROUPS_IN_RAM + CODING_GROUPS) * group_bytes
    return BuildPlan(
        output=options.output, references=settings.num_references, mean_length=float(order.lengths.mean()),
        codec=settings.codec, token_bytes=settings.token_bytes, record_bytes=settings.record.record_bytes,
        blocks=settings.num_blocks, missing_blocks=len(space.missing), missing_references=len(ids),
        shard_bytes=space.shard_bytes, manifest_bytes=space.manifest_bytes, codec_bytes=space.codec_bytes,
        missing_bytes=space.missing_bytes, free_bytes=space.free, open_shard_bytes=open_shard,
        group_bytes=group_bytes, sample_references=len(sample), sample_bytes=len(sample) * memory_bytes,
        model_bytes=model_bytes, activation_bytes=activation_bytes, rank_bytes=rank_bytes,
        first_rank_bytes=max(rank_bytes, process_bytes + TRAINING_SAMPLES * len(sample) * memory_bytes),
        sample_flops=training, write_flops=write, vectors=vectors, ranks=len(rates), tflops=tflops,
        is_measured=not options.plan_tflops, utilisation=options.plan_utilisation, model_seconds=model_seconds,
        training_seconds=codec.training_seconds, vectors_per_second=codec.vectors_per_second,
        is_scaled=codec.is_scaled, coding_seconds=coding_seconds,
        seconds=codec.training_seconds + model_seconds + coding_seconds,
    )


def _model_bytes(config: Config, tensor_parallel: int, batch_tokens: int) -> tuple[int, int]:
    """Of a rank's weights, and of what a layer makes in one pass."""
    model, size = config.model, 4 if config.training.dtype == "fp32" else 2
    embeddings = model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    weights = size * (model.num_non_embedding_parameters + embeddings) // tensor_parallel
    heads = model.head_size * (2 * model.num_heads + 2 * model.num_kv_heads)
    return weights, size * batch_tokens * (3 * model.hidden_size + (3 * model.ffn_size + heads) // tensor_parallel)


def _write_flops(config: Config, lengths: np.ndarray) -> float:
    counts = np.bincount(lengths)
    return float(sum(counts[length] * write_memory_flops(config, int(length)) for length in np.flatnonzero(counts)))


def plan_table(plan: BuildPlan) -> str:
    """A plan as text for people."""
    return "\n".join(f"{name:<20}{value}" for name, value in _lines(plan))


def _lines(plan: BuildPlan) -> Iterable[tuple[str, str]]:
    whole = plan.shard_bytes + plan.manifest_bytes + plan.codec_bytes
    yield "bank", f"{plan.output}: {plan.references:,} references of {plan.mean_length:.1f} tokens on average"
    yield "codec", f"{plan.codec}, {plan.token_bytes} bytes for the key and value of a kept token"
    yield "record", f"{plan.record_bytes:,} bytes a reference"
    yield "blocks", (f"{plan.blocks:,} for {plan.ranks:,} rank{'s' * (plan.ranks != 1)}; still missing: "
                     f"{plan.missing_blocks:,}, with {plan.missing_references:,} references")
    yield "disk", (f"{_bytes(whole)}: shards {_bytes(plan.shard_bytes)}, manifest and records "
                   f"{_bytes(plan.manifest_bytes)}, codec about {_bytes(plan.codec_bytes)}")
    yield "  still to write", _bytes(plan.missing_bytes)
    yield "  free", _room(plan)
    yield "  temporary", (f"{_bytes(plan.ranks * plan.open_shard_bytes)}: each rank's open shard, which becomes part "
                          "of the bank")
    yield "RAM", (f"about {_bytes(plan.rank_bytes)} a rank: model {_bytes(plan.model_bytes)}, a pass "
                  f"{_bytes(plan.activation_bytes)}, shard, three groups of memories of {_bytes(plan.group_bytes)} "
                  f"and their coding; rank 0 about {_bytes(plan.first_rank_bytes)}, with the codec's sample")
    if plan.codec == "none":
        yield "codec training", "none"
    elif plan.sample_references:
        yield "codec training", (f"on {plan.sample_references:,} references, encoded first: "
                                 f"{plan.sample_flops / TFLOP:,.4g} TFLOP; about "
                                 f"{format_seconds(plan.training_seconds)} for one thread")
    else:
        yield "codec training", "done"
    yield "writing", (f"{plan.write_flops / TFLOP:,.4g} TFLOP: the cost model's write_memory, each reference by its "
                      "own length, without prefix and padding")
    how = "measured here in a large matrix product" if plan.is_measured else "given"
    yield "hardware", (f"{plan.tflops:,.4g} TFLOP/s for all ranks, {how}; encoding is taken to reach "
                       f"{100 * plan.utilisation:.3g} % of it")
    yield "coding", (f"{plan.vectors:,} keys and values at {plan.vectors_per_second:,.4g}/s a rank: "
                     f"{format_seconds(plan.coding_seconds)}; timed here on random vectors"
                     + ", with smaller codebooks, and scaled by their sizes" * plan.is_scaled)
    yield "time", (f"about {format_seconds(plan.seconds)} ({plan.seconds / 3600:,.3g} hours), model "
                   f"{format_seconds(plan.model_seconds)}; not counted: loading it, and slow disks")


def _room(plan: BuildPlan) -> str:
    if plan.free_bytes is None:
        return "unknown"
    enough = plan.missing_bytes <= plan.free_bytes
    return _bytes(plan.free_bytes) + ("" if enough else ": TOO LITTLE, the build will not start")


def _bytes(count: int) -> str:
    return f"{count:,} bytes ({format_bytes(count)})" if count >= 1000 else f"{count} bytes"
