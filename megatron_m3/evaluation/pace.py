"""How fast a cluster trains by the cost model, and what its checkpoints take on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_m3.config import Config
from megatron_m3.config.flops import step_flops
from megatron_m3.evaluation.cost import TFLOP, format_bytes

CHECKPOINT_BYTES = {"bf16": 14, "fp32": 12}
"""Bytes of a parameter in a checkpoint: bf16 weights, fp32 weights and the two states of AdamW; fp32 needs no copy."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What trains."""

    gpus: int
    peak_tflops: float
    """TFLOP/s of one of them in a large matrix product."""
    utilisation: float
    """Share of it that training is taken to reach, recomputation not counted as work (MFU)."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """One stage of training on a cluster."""

    stage: str
    pflops_per_step: float
    steps_per_second: float
    tokens_per_second: float
    checkpoint_bytes: int


def training_pace(config: Config, cluster: Cluster) -> list[Pace]:
    """Both stages, with the batch and the sizes of ``config``."""
    model, training = config.model, config.training
    embeddings = model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    size = (model.num_non_embedding_parameters + embeddings) * CHECKPOINT_BYTES[training.dtype]
    rate = cluster.gpus * cluster.peak_tflops * TFLOP * cluster.utilisation
    paces = []
    for stage in ("warmup", "continual"):
        flops = step_flops(replace(config, training=replace(training, stage=stage))).total
        paces.append(Pace(
            stage=stage, pflops_per_step=flops / (1000 * TFLOP), steps_per_second=rate / flops,
            tokens_per_second=rate / flops * training.global_batch * config.data.sequence_length, checkpoint_bytes=size,
        ))
    return paces


def pace_table(cluster: Cluster, paces: Sequence[Pace]) -> str:
    """The figures as text for people."""
    head = (f"Training on {cluster.gpus} GPUs of {cluster.peak_tflops:g} TFLOP/s at a utilisation of "
            f"{100 * cluster.utilisation:g} %")
    rows = [f"  {one.stage:<10}{one.pflops_per_step:8.4g} PFLOP a step  {one.steps_per_second:8.3g} steps/s  "
            f"{one.tokens_per_second:12,.0f} tokens/s  checkpoint {format_bytes(one.checkpoint_bytes)}"
            for one in paces]
    return "\n".join([head, "", *rows])
