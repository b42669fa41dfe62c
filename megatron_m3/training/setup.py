"""From a config to what a training step needs: model chunks, gradient buffers, optimizer, laid over the processes."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.transformer.module import Float16Module

from megatron_m3.config import Config
from megatron_m3.model.gpt import DTYPES, build_model
from megatron_m3.platform import Platform
from megatron_m3.training.reuse import MemoryStore


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """All that a training step uses; the weights, optimizer states and memories inside change, the parts do not."""

    config: Config
    """Settings of the run."""
    platform: Platform
    """Device and backend."""
    chunks: list[Any]
    """Model chunks of this process, wrapped for gradient accumulation and data parallelism."""
    models: list[Any]
    """The same chunks unwrapped (GPTModel)."""
    optimizer: MegatronOptimizer
    """AdamW over the chunks' parameters, with fp32 states."""
    prefix: torch.Tensor
    """Token ids of the prefix, ``[P]``."""
    data_rank: int
    """Index of this process among those that share the batch."""
    data_size: int
    """Processes that share the batch."""
    memories: MemoryStore | None = None
    """Memories held for later steps, where the run reuses any."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of this process in one step."""
        training = self.config.training
        return training.global_batch // (training.micro_batch * self.data_size)


def build_machinery(
    config: Config, platform: Platform, prefix_ids: list[int], models: list[Any] | None = None
) -> Machinery:
    """Build model, gradient buffers and optimizer; the groups of processes must have been made.

    ``models`` are this process's chunks, where they are not to be built anew from ``config``.
    """
    models = models or build_model(config)
    freeze_layers(models, config)
    core = models[0].config
    # gradients are summed over tokens and divided once by the tokens of the global batch, in any layout
    core.calculate_per_token_loss = True
    core.finalize_model_grads_func = finalize_model_grads
    # with two stages both neighbours are one process, and messages of one batch to both would be taken for each other
    core.overlap_p2p_comm, core.batch_p2p_comm = config.parallel.interleave > 1, config.parallel.interleave == 1
    # a guard against races of old versions of torch: the host would wait for the device at every message
    core.batch_p2p_sync = False
    half = config.training.dtype == "bf16"
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=half, use_distributed_optimizer=config.parallel.distributed_optimizer
    )
    chunks = [
        DistributedDataParallel(core, buffers, Float16Module(core, model) if half else model)
        for model in models
    ]
    for chunk in chunks:
        chunk.train()
    optimizer = get_megatron_optimizer(_optimizer_config(config), chunks)
    prepare_optimizer(optimizer, config)
    data_size = parallel_state.get_data_parallel_world_size()
    return Machinery(
        config=config, platform=platform, chunks=chunks, models=models, optimizer=optimizer,
        prefix=torch.tensor(prefix_ids, dtype=torch.int64, device=platform.device),
        data_rank=parallel_state.get_data_parallel_rank(), data_size=data_size,
        memories=MemoryStore(config, data_size) if config.reuses_memories else None,
    )


def freeze_layers(models: list[Any], config: Config) -> None:
    """Take the lowest ``training.frozen_layers``, and with them the embedding, out of training."""
    count = config.training.frozen_layers
    if not count:
        return
    for model in models:
        low = [layer for layer in model.decoder.layers if layer.layer_number <= count]
        parts = [*low, *([model.embedding] if model.pre_process else [])]
        weights = [weight for part in parts for weight in part.parameters()]
        weights += [weight for weight in model.parameters() if getattr(weight, "shared_embedding", False)]
        for weight in weights:
            weight.requires_grad_(False)
        if config.parallel.recompute and model.pre_process:
            # a layer is recomputed in the backward pass only if its input has a gradient
            model.embedding.register_forward_hook(lambda module, given, out: out.requires_grad_())


def _optimizer_config(config: Config) -> CoreOptimizerConfig:
    optimizer = config.optimizer
    return CoreOptimizerConfig(
        optimizer="adam",
        # every step sets its own rate; groups are told apart by this one, so it must not differ between runs
        lr=1.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad,
        bf16=config.training.dtype == "bf16",
        params_dtype=DTYPES[config.training.dtype],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )


def prepare_optimizer(optimizer: MegatronOptimizer, config: Config) -> None:
    """Make a new or just restored optimizer ready: settings of this run, a state and a step count for each parameter.

    megatron-core makes states at the first step and cannot save before it; where it restores the states of torch's
    AdamW, all parameters share one step count, which would advance once for each of them; and it leaves weight decay
    by group to its own scheduler.
    """
    settings = config.optimizer
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.epsilon
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state.get("step", torch.tensor(0.0)).clone()
