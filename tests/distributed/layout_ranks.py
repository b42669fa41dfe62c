"""Ranks of test_layouts: train the same few steps in each given layout, and write what each step said."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_m3.config import Config, get_recipe, replace_fields
from megatron_m3.platform import select
from megatron_m3.platform.distributed import initialize_parallel, shut_down
from tests.reused_batches import reused_batches

BASE = {"training.stage": "continual", "training.global_batch": "4", "training.micro_batch": "1"}
STEPS = 4
PREFIX = [1, 17, 23, 5]


def make_batch(config: Config, step: int) -> dict[str, torch.Tensor]:
    """A global batch with missing references, references of many lengths, and tokens that do not count."""
    generator = torch.Generator().manual_seed(1000 + step)
    sequences, length = config.training.global_batch, config.data.sequence_length
    chunks, reference_length = length // config.memory.chunk_length, config.memory.reference_length
    tokens = torch.randint(3, config.model.vocab_size, (sequences, length + 1), generator=generator)
    lengths = torch.randint(1, reference_length + 1, (sequences, chunks), generator=generator)
    lengths[torch.rand(lengths.shape, generator=generator) < 0.25] = 0
    references = torch.randint(3, config.model.vocab_size, (sequences, chunks, reference_length), generator=generator)
    references[torch.arange(reference_length) >= lengths[..., None]] = 0
    mask = (torch.rand(sequences, length, generator=generator) > 0.1).float()
    batch = {"context": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}
    if config.num_references == chunks:
        return batch | {"references": references, "reference_lengths": lengths}
    order = torch.rand(lengths.shape, generator=generator).argsort(-1)[:, : config.num_references]
    places = torch.full((sequences, chunks), -1).scatter(1, order, torch.arange(config.num_references).expand_as(order))
    return batch | {"references": references.gather(1, order[..., None].expand(-1, -1, reference_length)),
                    "reference_lengths": lengths.gather(1, order), "chunk_references": places}


def micro_batches(config: Config, data_rank: int, data_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This process's share of every global batch, in micro-batches."""
    size = config.training.micro_batch
    if config.training.reuse_memories:
        yield from reused_batches(config, STEPS, data_rank, data_size)
        return
    for step in range(STEPS):
        batch = make_batch(config, step)
        if config.training.stage == "warmup":
            batch = {name: batch[name] for name in ("context", "labels", "loss_mask")}
        for first in range(data_rank * size, config.training.global_batch, data_size * size):
            yield {name: tensor[first : first + size] for name, tensor in batch.items()}


def run_layout(overrides: dict[str, str]) -> dict[str, Any]:
    """Fingerprint of the initial weights; loss, gradient norm and tokens of each step."""
    config = replace_fields(get_recipe("tiny"), BASE | overrides)
    from megatron.core import parallel_state

    from megatron_m3.model.weights_hash import weights_hash
    from megatron_m3.training.schedule import gradient_in_references
    from megatron_m3.training.setup import build_machinery
    from megatron_m3.training.step import training_step

    platform = initialize_parallel(config.parallel, config.training.seed)
    machinery = build_machinery(config, platform, PREFIX)
    initial = weights_hash(machinery.models)
    batches = micro_batches(config, machinery.data_rank, machinery.data_size)
    results = [training_step(machinery, batches, 1e-3,
                             reference_gradient=gradient_in_references(step, config.training)) for step in range(STEPS)]
    parallel_state.destroy_model_parallel()
    return {"initial": initial, "steps": [[result.loss, result.grad_norm, result.tokens] for result in results],
            "reused": [result.reused for result in results]}


def main() -> None:
    """``layout_ranks OUTPUT LAYOUTS``: LAYOUTS is a JSON object of overrides by name."""
    torch.set_num_threads(1)
    select()
    found = {name: run_layout(overrides) for name, overrides in json.loads(sys.argv[2]).items()}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
