"""One optimizer step: micro-batches through the pipeline schedule, gradients, clipping, update."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_m3.errors import DataError, M3Error
from megatron_m3.model.gpt import training_forward
from megatron_m3.training.setup import Machinery

Batch = dict[str, Tensor]


class ReadingError(DataError):
    """Training data that one process could not read; the others may not know."""

    met_by_one_process = True


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step says of itself; the same on all processes."""

    loss: float
    """Mean over the tokens of the global batch that count, in nats."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    tokens: int
    """Tokens that count."""
    read: int
    """Chunks that have a reference."""
    encoded: int
    """References that were encoded for them."""
    reused: int
    """References of micro-batches whose memories were held."""
    request: int
    """Largest request of any process, as given to :func:`training_step`."""


def training_step(
    machinery: Machinery, micro_batches: Iterator[Batch], rate: float, request: int = 0,
    num_kept_tokens: int | None = None, reference_gradient: bool = True,
) -> StepResult:
    """Train on the next global batch at learning rate ``rate``.

    Args:
        machinery: of this process.
        micro_batches: of this process; :attr:`Machinery.num_micro_batches` of them are taken.
        rate: learning rate of this step.
        request: a number that all processes should agree on; the largest one comes back.
        num_kept_tokens: tokens kept of a full reference in this step; by default the config's.
        reference_gradient: whether the gradient flows through the references in this step.
    """
    config, device = machinery.config, machinery.platform.device
    batches = _read(machinery, micro_batches, num_kept_tokens)
    for chunk in machinery.chunks:
        chunk.zero_grad_buffer()
    machinery.optimizer.zero_grad()
    iterators = [iter(batches) for _ in machinery.chunks]
    sums = get_forward_backward_func()(
        forward_step_func=partial(_forward, machinery, num_kept_tokens, reference_gradient),
        data_iterator=iterators,
        model=machinery.chunks,
        num_microbatches=machinery.num_micro_batches,
        seq_length=config.data.sequence_length,
        micro_batch_size=config.training.micro_batch,
        forward_only=False,
    )
    for group in machinery.optimizer.param_groups:
        group["lr"] = rate
    _, grad_norm, _ = machinery.optimizer.step()
    (total, tokens, read, encoded, reused), asked = _agree(sums, batches, request, device)
    return StepResult(
        loss=total / max(tokens, 1), grad_norm=float(grad_norm), tokens=int(tokens), read=int(read),
        encoded=int(encoded), reused=int(reused), request=asked,
    )


def _read(machinery: Machinery, micro_batches: Iterator[Batch], num_kept_tokens: int | None) -> list[Batch]:
    try:
        read = [next(micro_batches) for _ in range(machinery.num_micro_batches)]
    except M3Error as error:
        raise ReadingError(str(error)) from error
    if machinery.memories is not None:
        read = machinery.memories.next_step(read, num_kept_tokens)
    device = machinery.platform.device
    return [{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} for batch in read]


def _forward(
    machinery: Machinery, num_kept_tokens: int | None, reference_gradient: bool, batches: Iterator[Batch],
    chunk: torch.nn.Module,
) -> tuple[Tensor, Any]:
    """The schedule's forward step: output of this chunk, and how the last stage turns it into a loss."""
    batch = next(batches)
    table = None if machinery.memories is None else machinery.memories.table
    out = training_forward(
        chunk, batch, machinery.config, machinery.prefix, num_kept_tokens, reference_gradient, table
    )
    return out, partial(_sum_loss, batch["loss_mask"])


def _sum_loss(mask_BS: Tensor, loss_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, number of tokens that count, and both for the record."""
    total, tokens = (loss_BS.float() * mask_BS).sum(), mask_BS.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens]).double()


def _agree(
    sums: list[Tensor], batches: list[Batch], request: int, device: torch.device
) -> tuple[list[float], int]:
    """Summed loss, tokens, references read, encoded and reused, and the largest request, over all processes.

    The loss is known to the last pipeline stage only, and to each tensor-parallel process there alike.
    """
    shared = torch.zeros(5 + dist.get_world_size(), dtype=torch.float64, device=device)
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
        shared[:2] = torch.stack(sums).sum(0)
        shared[2:5] = torch.stack([_count_references(batch) for batch in batches]).sum(0)
    shared[5 + dist.get_rank()] = request
    dist.all_reduce(shared)
    found = shared.tolist()
    return found[:5], int(max(found[5:]))


def _count_references(batch: Batch) -> Tensor:
    """Chunks of a micro-batch that have a reference, references that are encoded, and held memories, ``[3]``."""
    if "references" not in batch:
        return batch["context"].new_zeros(3)
    encoded = batch["reference_lengths"] > 0
    read = batch["chunk_references"] >= 0 if "chunk_references" in batch else encoded
    held = torch.tensor(len(batch.get("read_slots", ())), device=read.device)
    return torch.stack([read.sum(), encoded.sum(), held])
