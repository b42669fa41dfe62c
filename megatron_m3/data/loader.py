"""Loaders: endless micro-batches for one data-parallel rank, read ahead of the training step.

Global batch b holds the sequences at positions ``consumed + [b * global_batch, (b + 1) * global_batch)`` of the order.
Micro-batch m of rank r takes ``m * micro_batch * data_size + r * micro_batch + [0, micro_batch)`` of them, so a global
batch is the same whatever the layout, and a run goes on exactly where it stopped.
"""

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from megatron_m3.config import Config
from megatron_m3.data.dataset import TrainingDataset
from megatron_m3.data.micro_batch import stack_sequences
from megatron_m3.data.order import sequence_at
from megatron_m3.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    import torch

type Batch = dict[str, torch.Tensor]


def build_loader(
    config: Config, dataset: TrainingDataset, *, consumed: int, data_rank: int, data_size: int
) -> Iterator[Batch]:
    """Micro-batches of rank ``data_rank`` of ``data_size``, from sequence ``consumed`` of the order on, without end.

    Each is a dictionary of CPU tensors, the arrays of :func:`stack_sequences`, [micro_batch, ...].

    Raises:
        ConfigError: the micro-batches of all ranks do not fill the global batch evenly.
        UnsupportedError: data.loader is dali and DALI is not installed.
    """
    step = config.training.micro_batch * data_size
    if config.training.global_batch % step:
        raise ConfigError(
            f"training.global_batch={config.training.global_batch}: must be a multiple of training.micro_batch="
            f"{config.training.micro_batch} times the {data_size} data-parallel ranks"
        )
    indices = sequence_numbers(config, len(dataset), consumed, data_rank, data_size)
    if config.data.loader == "dali":
        batches = _dali_batches(config, dataset, indices)
    else:
        batches = _torch_batches(config, dataset, indices)
    return ReadAhead(batches, config.data.prefetch)


def sequence_numbers(
    config: Config, size: int, consumed: int, data_rank: int, data_size: int
) -> Iterator[list[int]]:
    """The numbers of the sequences in each micro-batch of one rank."""
    micro_batch = config.training.micro_batch
    for start in itertools.count(consumed + data_rank * micro_batch, micro_batch * data_size):
        yield [sequence_at(position, size, config.data.seed) for position in range(start, start + micro_batch)]


def _torch_batches(config: Config, dataset: TrainingDataset, indices: Iterator[list[int]]) -> Iterator[Batch]:
    import torch
    from torch.utils.data import DataLoader

    def collate(sequences: list[dict[str, np.ndarray]]) -> Batch:
        return {name: torch.from_numpy(array) for name, array in stack_sequences(sequences, config).items()}

    return iter(DataLoader(dataset, batch_sampler=indices, collate_fn=collate))  # type: ignore[arg-type]


def _dali_batches(config: Config, dataset: TrainingDataset, indices: Iterator[list[int]]) -> Iterator[Batch]:
    import torch

    try:
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UnsupportedError(f"data.loader=dali: DALI cannot be used ({error}); install it or set torch") from None

    def read() -> list[np.ndarray]:
        arrays = stack_sequences([dataset[index] for index in next(indices)], config)
        return [arrays[name] for name in dataset.names]

    pipeline = Pipeline(batch_size=config.training.micro_batch, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        pipeline.set_outputs(*fn.external_source(source=read, num_outputs=len(dataset.names)))
    pipeline.build()
    # The dynamic executor gives its output buffers away, so batches need no copy.
    return (
        {name: torch.from_dlpack(out.as_tensor()) for name, out in zip(dataset.names, outputs, strict=True)}
        for outputs in iter(pipeline.run, None)
    )


class ReadAhead[T]:
    """Iterates over ``source`` in a thread that keeps up to ``count`` items ready; ends when it is dropped."""

    def __init__(self, source: Iterator[T], count: int) -> None:
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)
        stop = threading.Event()
        thread = threading.Thread(target=_fill, args=(source, self._ready, stop), daemon=True, name="read ahead")
        thread.start()
        self.close: Callable[[], Any] = weakref.finalize(self, _end, self._ready, stop, thread)
        """Stop reading; done by itself when the object is dropped."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))
            raise error
        return item  # type: ignore[return-value]


def _fill[T](source: Iterator[T], ready: queue.Queue[Any], stop: threading.Event) -> None:
    try:
        for item in source:
            ready.put((item, None))
            if stop.is_set():
                return
        ready.put((None, StopIteration()))
    except BaseException as error:  # whatever it is, the reader's caller must see it
        ready.put((None, error))


def _end(ready: queue.Queue[Any], stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while thread.is_alive():
        while not ready.empty():
            ready.get_nowait()
        thread.join(0.01)
