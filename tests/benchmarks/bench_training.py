"""Time of a training step beside that of a plain megatron-core GPT of the same shape, in one run.

    python -m tests.benchmarks.bench_training [rounds]

Every round takes one step of each model, so that drift of the machine cancels; medians of processor time are compared.
The plain model is megatron-core's GPTModel as it comes: its local layer spec, its rotary embedding, its
DotProductAttention. A spared step has no gradient through the references; in a halved one two chunks share each; in a
reused one the memories of all are held.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron_m3.config import Config, get_recipe, replace_fields
from megatron_m3.config.flops import ReferenceWork, step_flops
from megatron_m3.platform import select
from megatron_m3.platform.distributed import parallel_world

PREFIX = [1, 17, 23, 5]
WARMUP_LIMIT, CONTINUAL_LIMIT = 1.03, 1.15


def shape(stage: str) -> Config:
    """A model and a sequence large enough that arithmetic, not overhead, is timed."""
    return replace_fields(get_recipe("demo"), {
        "model.num_layers": "8", "model.num_heads": "8", "model.num_kv_heads": "2", "model.head_size": "64",
        "model.hidden_size": "512", "model.ffn_size": "512", "data.sequence_length": "1024",
        "training.stage": stage, "training.global_batch": "1", "training.micro_batch": "1",
    })


def plain_model(config: Config) -> Any:
    """megatron-core's own GPT of the same shape, with the same initial weights."""
    import dataclasses

    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_m3.model.gpt import initialize_weights, transformer_config

    class PlainGPT(GPTModel):
        """Takes the arguments of a training pass, and ignores the plan."""

        def forward(self, input_ids: torch.Tensor, position_ids: None, attention_mask: None, **kwargs: Any) -> Any:
            del kwargs["extra_block_kwargs"]
            length = input_ids.shape[1]
            positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device).triu(1)
            return super().forward(input_ids, positions, mask, **kwargs)

    core = dataclasses.replace(transformer_config(config))
    model = PlainGPT(
        core, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=config.model.padded_vocab_size,
        max_sequence_length=config.data.sequence_length, position_embedding_type="rope",
        share_embeddings_and_output_weights=config.model.tie_embeddings,
    )
    initialize_weights(model, config)
    return model.to(torch.cuda.current_device())


def batches(config: Config, readers: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    """The same random batch for ever; every chunk has a full reference, which ``readers`` chunks share."""
    B, S = config.training.micro_batch, config.data.sequence_length
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, config.model.vocab_size, (B, S + 1), generator=generator)
    batch = {"context": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(B, S)}
    if config.training.stage == "continual":
        chunks = S // config.memory.chunk_length
        size = (B, chunks // readers, config.memory.reference_length)
        batch["references"] = torch.randint(3, config.model.vocab_size, size, generator=generator)
        batch["reference_lengths"] = torch.full(size[:2], config.memory.reference_length)
        batch["chunk_references"] = torch.arange(B * chunks).reshape(B, chunks) // readers
        batch["reference_ids"] = torch.arange(size[0] * size[1]).reshape(size[:2])
    while True:
        yield batch


def main() -> None:
    """Print the ratios beside their floors."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    torch.set_num_threads(1)
    select()
    from megatron_m3.training.setup import build_machinery
    from megatron_m3.training.step import training_step

    warmup, continual = shape("warmup"), shape("continual")
    reusing = replace_fields(continual, {"training.reuse_memories": "1000", "training.reuse_bytes": str(2**24)})
    with parallel_world(warmup.parallel, 1) as platform:
        with_memory = build_machinery(continual, platform, PREFIX)
        trained = {
            "plain": (build_machinery(warmup, platform, PREFIX, [plain_model(warmup)]), batches(warmup), True),
            "warmup": (build_machinery(warmup, platform, PREFIX), batches(warmup), True),
            "continual": (with_memory, batches(continual), True),
            "spared": (with_memory, batches(continual), False),
            "halved": (with_memory, batches(continual, 2), True),
            "both": (with_memory, batches(continual, 2), False),
            "reused": (build_machinery(reusing, platform, PREFIX), batches(reusing), True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in trained}
        losses: dict[str, float] = {}
        for _ in range(rounds + 2):
            for name, (machinery, read, gradient) in trained.items():
                start = time.process_time()
                losses[name] = training_step(machinery, read, 1e-4, reference_gradient=gradient).loss
                seconds[name].append(time.process_time() - start)
    assert abs(losses["plain"] - losses["warmup"]) < 1e-3, "not the same model"
    report({name: statistics.median(times[2:]) for name, times in seconds.items()}, warmup, continual)


def report(median: dict[str, float], warmup: Config, continual: Config) -> None:
    """Print medians, ratios, and the limits they are to keep."""
    print("seconds a step: " + ", ".join(f"{name} {value:.3f}" for name, value in median.items()))
    ratio = median["warmup"] / median["plain"]
    print(f"warmup / plain      {ratio:6.3f}   limit {WARMUP_LIMIT:6.3f}   "
          f"{'met' if ratio <= WARMUP_LIMIT else 'MISSED'}")
    chunks, base = continual.num_references, step_flops(warmup).total
    half = chunks / 2
    steps = {"continual": (chunks, 1.0), "spared": (chunks, 0.0), "halved": (half, 1.0), "both": (half, 0.0),
             "reused": (0, 1.0)}
    for name, (encoded, gradient) in steps.items():
        work = ReferenceWork(read=chunks, encoded=encoded, gradient=gradient)
        flops = step_flops(continual, prefix_length=len(PREFIX), work=work).total / base
        for other in ("plain", "warmup"):
            ratio = median[name] / median[other]
            print(f"{name:<10}/ {other:<8}{ratio:6.3f}   limit {flops * CONTINUAL_LIMIT:6.3f}   "
                  f"{'met' if ratio <= flops * CONTINUAL_LIMIT else 'MISSED'}   (FLOPs imply {flops:.3f})")


if __name__ == "__main__":
    main()
