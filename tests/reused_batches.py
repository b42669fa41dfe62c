"""Global batches in which every sequence keeps reading the same few references, so that memories can be reused.

A sequence's references are its own, so replicas that share a global batch reuse what one process would.
"""

from collections.abc import Iterator

import numpy as np
import torch

from megatron_m3.config import Config
from megatron_m3.data.micro_batch import stack_sequences


def sequence(config: Config, step: int, place: int, num_known: int) -> dict[str, np.ndarray]:
    """The sequence at a place of a step's global batch, as the dataset gives it."""
    draw = np.random.default_rng([step, place])
    length, size, vocab = config.data.sequence_length, config.memory.reference_length, config.model.vocab_size
    chunks = length // config.memory.chunk_length
    ids = np.where(draw.random(chunks) < 0.8, place * num_known + draw.integers(num_known, size=chunks), -1)
    there = np.flatnonzero(ids >= 0)
    references, lengths = np.zeros((chunks, size), np.int64), np.zeros(chunks, np.int64)
    kept, places = np.full(chunks, -1), np.full(chunks, -1)
    kept[: len(there)], places[there] = ids[there], np.arange(len(there))
    for row, reference in enumerate(ids[there]):
        text = np.random.default_rng([7, int(reference)])
        lengths[row] = text.integers(1, size + 1)
        references[row, : lengths[row]] = text.integers(3, vocab, lengths[row])
    tokens = draw.integers(3, vocab, length + 1)
    return {"context": tokens[:-1], "labels": tokens[1:], "loss_mask": np.ones(length, np.float32),
            "references": references, "reference_lengths": lengths, "chunk_references": places, "reference_ids": kept}


def reused_batches(
    config: Config, steps: int, data_rank: int = 0, data_size: int = 1, num_known: int = 6
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of one replica; every sequence reads ``num_known`` references in all."""
    size = config.training.micro_batch
    for step in range(steps):
        for first in range(data_rank * size, config.training.global_batch, data_size * size):
            arrays = [sequence(config, step, first + place, num_known) for place in range(size)]
            yield {name: torch.from_numpy(array) for name, array in stack_sequences(arrays, config).items()}
