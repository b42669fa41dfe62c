"""What a pipeline layout gives each stage: layers, work, waiting and memory, beside the even split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from megatron_m3.config import Config, stage_layers
from megatron_m3.config.pipeline_time import PipelineTime, most_held, pipeline_time
from megatron_m3.config.reuse import held_layers, memory_bytes, most_kept_tokens, num_slots
from megatron_m3.config.split import chunk_costs, even_layers, part_costs
from megatron_m3.errors import ConfigError
from megatron_m3.evaluation.cost import TFLOP, columns, format_bytes
from megatron_m3.training.checks import num_micro_batches

LOGIT_BYTES = 4
"""The loss keeps its softmax in fp32."""
LARGE_BUBBLE = 0.1
"""Share of waiting from which a way to less of it is told."""

MANY_CHUNKS = 16
"""Of more model chunks, those in a row with as many layers are told together."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One pipeline stage; bytes are those of one of its processes."""

    layers: tuple[tuple[int, int], ...]
    """First layer and number of layers of each of its model chunks."""
    memory_layers: int
    flops: float
    """In one micro-batch, forward and backward, over all its tensor-parallel processes."""
    flops_share: float
    """Of all stages'."""
    waits: float
    """Share of a step in which it waits for other stages."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Most that is kept for backward passes at once; what kernels use while they run is not counted."""
    held_bytes: int
    """Memories that are held for later steps (training.reuse_memories)."""


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """A layout's stages, and its step beside that of other splits. Messages are taken to cost no time."""

    split: tuple[int, ...]
    """Layers of each model chunk."""
    micro_batches: int
    """In a step, of each process."""
    bubble: float
    """Share of all stages' time in which they wait."""
    stages: tuple[StagePlan, ...]
    slowest_to_even: float
    """FLOPs of the slowest stage over those with the even split."""
    time_to_even: float
    """Time of a step over that with the even split."""
    even_split: tuple[int, ...]
    even_bubble: float
    advice: tuple[str, ...]
    """What would change the most, one sentence each."""


def pipeline_plan(config: Config, processes: int) -> PipelinePlan:
    """What the split of ``config`` gives each stage, on ``processes`` processes.

    Raises:
        ConfigError: the layout or the batch does not go into so many processes.
    """
    parallel, micro_batches = config.parallel, num_micro_batches(config, processes)
    split = stage_layers(config)
    even = even_layers(config.model.num_layers, len(split))
    time, even_time = (_time(config, micro_batches, layers) for layers in (split, even))
    data_size = processes // (parallel.tensor * parallel.pipeline)
    return PipelinePlan(
        split=split, micro_batches=micro_batches, bubble=time.bubble,
        stages=tuple(_stage(config, split, stage, time, micro_batches, data_size)
                     for stage in range(parallel.pipeline)),
        slowest_to_even=max(time.busy) / max(even_time.busy), time_to_even=time.total / even_time.total,
        even_split=even, even_bubble=even_time.bubble, advice=tuple(_advice(config, time, micro_batches)),
    )


def _time(config: Config, micro_batches: int, layers: Sequence[int] | None = None) -> PipelineTime:
    """The schedule with other ``layers`` than the config's, where given; in FLOPs."""
    sequences = config.training.micro_batch
    forward, backward = zip(*chunk_costs(config, layers or stage_layers(config)), strict=True)
    return pipeline_time([sequences * cost for cost in forward], [sequences * cost for cost in backward],
                         config.parallel.pipeline, micro_batches)


def _stage(config: Config, split: Sequence[int], stage: int, time: PipelineTime, micro_batches: int,
           data_size: int) -> StagePlan:
    stages, firsts = config.parallel.pipeline, [0, *accumulate(split)]
    runs = tuple((firsts[chunk], split[chunk]) for chunk in range(stage, len(split), stages))
    layers = [layer for first, count in runs for layer in range(first, first + count)]
    weights, trained = _parameters(config, layers, stage)
    half = config.training.dtype == "bf16"
    # bf16 is trained beside a copy in fp32; AdamW has two states
    optimizer = trained * (12 if half else 8) // (data_size if config.parallel.distributed_optimizer else 1)
    return StagePlan(
        layers=runs, memory_layers=len(set(layers) & set(config.memory_layers)),
        flops=time.busy[stage] / micro_batches, flops_share=time.busy[stage] / sum(time.busy),
        waits=1 - time.busy[stage] / time.total,
        weight_bytes=weights * (2 if half else 4), gradient_bytes=trained * 4, optimizer_bytes=optimizer,
        activation_bytes=_activation_bytes(config, split, stage, micro_batches),
        held_bytes=_held_bytes(config, stage, data_size),
    )


def _held_bytes(config: Config, stage: int, data_size: int) -> int:
    if not config.reuses_memories:
        return 0
    kept = most_kept_tokens(config)
    return num_slots(config, kept, data_size) * memory_bytes(config, kept, held_layers(config)[stage])


def _parameters(config: Config, layers: Sequence[int], stage: int) -> tuple[int, int]:
    """Parameters of a process of a stage: all, and those that are trained."""
    model, ranks, frozen = config.model, config.parallel.tensor, config.training.frozen_layers
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    norms = 2 * model.hidden_size
    layer = (model.num_layer_parameters - norms) // ranks + norms
    table = model.padded_vocab_size * model.hidden_size // ranks
    # one process that does both holds a shared table once
    outer = [first, last and not (first and model.tie_embeddings)]
    trained = [outer[0] and not frozen, outer[1] and not (frozen and model.tie_embeddings)]
    norm = model.hidden_size * last
    above = sum(index >= frozen for index in layers)
    return layer * len(layers) + table * sum(outer) + norm, layer * above + table * sum(trained) + norm


def layer_activation_bytes(config: Config, layer: int) -> int:
    """What one layer keeps of one sequence for its backward pass, on one process, if it is not recomputed.

    For each token: input and output of both norms; query, key and value, repeated for the query heads where no memories
    are read, and what they give, twice where the parts of a joint sequence are put together; gate and up projections,
    and their product. A memory layer also keeps what it chose keys and values from. Norms and SwiGLU are taken to be
    one kernel each, as on CUDA; made of parts, as on the CPU, they keep another copy or two.
    """
    model, ranks = config.model, config.parallel.tensor
    residual = model.hidden_size // (ranks if config.parallel.sequence else 1)
    query, key = (heads * model.head_size // ranks for heads in (model.num_heads, model.num_kv_heads))
    trunk, references = config.data.sequence_length, _reference_tokens(config, layer)
    # of references the last memory layer makes keys and values, no more
    joint = references > 0 and layer < config.memory_layers[-1]
    reads = config.training.stage == "continual" and layer in config.memory_layers
    token = 4 * residual + joint * query + 3 * model.ffn_size // ranks
    numbers = trunk * (token + (1 if reads else 4) * query)
    numbers += references * (token + 4 * query if joint else 2 * residual)
    if reads:
        numbers += (trunk + references) * (query + 2 * key) + references * key
    return _number_bytes(config) * numbers


def _number_bytes(config: Config) -> int:
    return 2 if config.training.dtype == "bf16" else 4


def _reference_tokens(config: Config, layer: int) -> int:
    """Most tokens of references that a layer keeps something of for the backward pass of one sequence."""
    training = config.training
    if training.stage == "warmup" or training.reference_gradient_every == 0 or layer > config.memory_layers[-1]:
        return 0
    return config.num_references * config.memory.reference_length


def _activation_bytes(config: Config, split: Sequence[int], stage: int, micro_batches: int) -> int:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    residual = model.hidden_size // (parallel.tensor if parallel.sequence else 1)
    kept = [layer_activation_bytes(config, layer) for layer in range(model.num_layers)]
    largest = 0
    if parallel.recompute:
        # of each layer only its input is kept, and everything of the one that is being recomputed
        largest = max(kept)
        kept = [_number_bytes(config) * residual * (length + _reference_tokens(config, layer))
                for layer in range(model.num_layers)]
    ends = list(accumulate(split))
    sizes = [sum(kept[end - count : end]) for end, count in zip(ends, split, strict=True)]
    head = LOGIT_BYTES * model.padded_vocab_size // parallel.tensor + 2 * _number_bytes(config) * residual
    sizes[-1] += length * head
    held = most_held(sizes, stage, parallel.pipeline, micro_batches)
    return int(config.training.micro_batch * (held + largest * (split[stage] > 0)))


def _advice(config: Config, time: PipelineTime, micro_batches: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    if parallel.pipeline == 1:
        return

    def shortened(**changes: object) -> float:
        try:
            other = _laid_out(config, **changes)
        except ConfigError:  # too few layers for it
            return 0.0
        return 1 - _time(other, micro_batches).total / time.total

    if parallel.split != "auto" and (better := shortened(split="auto")) > 0.001:
        planned = stage_layers(_laid_out(config, split="auto"))
        yield f"parallel.split=auto plans {_numbers(planned)}, which shortens a step by {_percent(better)}."
    names = ["the embedding", *(f"layer {layer}" for layer in range(config.model.num_layers)), "the output projection"]
    part, name = max(zip(map(sum, part_costs(config)), names, strict=True))
    if micro_batches * training.micro_batch * part > 0.999 * max(time.busy):
        yield (f"The slowest stage is {name} alone, so no split is faster: take fewer stages, or a larger "
               "parallel.tensor.")
    if time.bubble < LARGE_BUBBLE:
        return
    doubled = _time(config, 2 * micro_batches).bubble
    if doubled < 0.8 * time.bubble:
        ways = [f"training.global_batch={2 * training.global_batch}"]
        ways += [f"training.micro_batch={training.micro_batch // 2}"] * (training.micro_batch % 2 == 0)
        yield f"Twice the micro-batches ({' or '.join(ways)}) would bring the waiting to {_percent(doubled)}."
    if parallel.interleave == 1 and micro_batches % parallel.pipeline == 0:
        better = shortened(split="auto", interleave=2)
        if better > 0.001:
            yield f"parallel.interleave=2 would shorten a step by {_percent(better)}, for more messages."


def _laid_out(config: Config, **changes: object) -> Config:
    return replace(config, parallel=replace(config.parallel, **changes))  # type: ignore[arg-type]


def plan_table(config: Config, plan: PipelinePlan) -> str:
    """A plan as text for people."""
    total = sum(stage.flops for stage in plan.stages)
    flops = f"{total / len(plan.stages) / TFLOP:.4g} TFLOP"
    rows = [
        (str(number), " ".join(_range(*run) for run in stage.layers), str(stage.memory_layers),
         _percent(stage.flops_share), _percent(stage.waits), format_bytes(stage.weight_bytes),
         format_bytes(stage.gradient_bytes), format_bytes(stage.optimizer_bytes),
         format_bytes(stage.activation_bytes))
        for number, stage in enumerate(plan.stages)
    ]
    head = ("stage", "layers", "memory layers", "FLOPs", "waits", "weights", "gradients", "optimizer", "activations")
    lines = [
        f"{len(plan.stages)} pipeline stage{'s' * (len(plan.stages) > 1)} of {_numbers(plan.split)} layers "
        f"(parallel.split={config.parallel.split}), {config.training.stage} stage, {plan.micro_batches} micro-batches "
        f"of {config.training.micro_batch} in a step",
        "",
        *columns(head, *rows),
        "",
        f"A stage's even share is {flops} a micro-batch; the stages wait {_percent(plan.bubble)} of the time.",
    ]
    if plan.split != plan.even_split:
        lines.append(f"Beside the even split {_numbers(plan.even_split)}: slowest stage {plan.slowest_to_even:.3f}, "
                     f"step {plan.time_to_even:.3f} of its time; there they wait {_percent(plan.even_bubble)}.")
    if held := max(stage.held_bytes for stage in plan.stages):
        lines.append(f"For later steps a process holds memories of up to {format_bytes(held)}.")
    lines.append("Bytes are those of one process. Embedding, norms, optimizer and messages are taken to cost no time.")
    return "\n".join([*lines, *plan.advice])


def _range(first: int, count: int) -> str:
    return f"{first}-{first + count - 1}" if count > 1 else str(first) if count else "none"


def _numbers(layers: Sequence[int]) -> str:
    """As ``parallel.split`` takes them; many of them, shorter."""
    if len(layers) <= MANY_CHUNKS:
        return ",".join(map(str, layers))
    runs = [(number, len(list(run))) for number, run in groupby(layers)]
    return ", ".join(f"{number} ({count} times)" if count > 1 else str(number) for number, count in runs)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
