"""What is written beside a run's results so that it can be understood and repeated: settings and environment."""

import json
import platform as python_platform
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

import megatron_m3
from megatron_m3.config import dump_json, stage_layers
from megatron_m3.manifest import atomic_path
from megatron_m3.ops.choice import choose_backend
from megatron_m3.platform import report
from megatron_m3.training.setup import Machinery


def optimizer_name(machinery: Machinery) -> str:
    """The class that really updates the weights, such as ``torch.optim.adamw.AdamW``."""
    [part] = machinery.optimizer.chained_optimizers
    return _class_name(part.optimizer)


def norm_name(machinery: Machinery) -> str:
    """The class of the model's norms."""
    # a first pipeline stage may be without layers
    norms = (part for part in machinery.models[0].modules() if "norm" in type(part).__name__.lower())
    return next(map(_class_name, norms), "none on the first stage")


def _class_name(live: object) -> str:
    return f"{type(live).__module__}.{type(live).__qualname__}"


def write_run_record(machinery: Machinery) -> None:
    """Write ``config.json`` and ``environment.json`` into the run's folder."""
    output, parallel = Path(machinery.config.training.output), machinery.config.parallel
    environment = {
        "command": sys.argv,
        "megatron-m3": megatron_m3.__version__,
        "python": python_platform.python_version(),
        "numpy": np.__version__,
        **report(),
        "optimizer": optimizer_name(machinery),
        "norm": norm_name(machinery),
        "attention": str(choose_backend(machinery.config.model)),
        "system": python_platform.platform(),
        "processes": dist.get_world_size(),
        "layout": {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "split": stage_layers(machinery.config),
            "data": machinery.data_size,
            "sequence_parallel": parallel.sequence,
            "distributed_optimizer": parallel.distributed_optimizer,
            "micro_batches": machinery.num_micro_batches,
        },
    }
    for name, text in (
        ("config.json", dump_json(machinery.config)),
        ("environment.json", json.dumps(environment, indent=2) + "\n"),
    ):
        with atomic_path(output / name) as path:
            path.write_text(text)


def describe(machinery: Machinery) -> str:
    """What is live and how the model lies over the processes, as one line."""
    found, parallel, model = report(), machinery.config.parallel, machinery.config.model
    layers = f" ({','.join(map(str, stage_layers(machinery.config)))} layers)" if parallel.pipeline > 1 else ""
    return (
        f"{found['device']} x {dist.get_world_size()} ({found['backend']}): tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline}{layers} x data {machinery.data_size}; "
        f"{model.num_non_embedding_parameters:,} non-embedding parameters, {machinery.config.training.dtype}; "
        f"optimizer {optimizer_name(machinery)}, norm {norm_name(machinery)}, attention {choose_backend(model)}"
    )
