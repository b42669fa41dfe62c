"""The forward passes of a batch's steps, as CUDA graphs if that is wanted.

A step launches several hundred kernels, and launching them takes the host longer than running them takes a card. A
graph is launched at once. It repeats the same operations on the same tensors, so one serves until sequences join or
leave: what changes from step to step stands in tensors.
"""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_m3.config import Config
from megatron_m3.errors import UnsupportedError
from megatron_m3.inference.cache import CachePlan
from megatron_m3.inference.decoder import Decoder
from megatron_m3.ops.choice import choose_backend, takes_triton

CAPTURE_AFTER = 4
"""Steps of an unchanged batch before one is captured, which takes as long as about three."""


def check_graphs(config: Config, device: torch.device) -> None:
    """Refuse CUDA graphs where steps are none.

    Raises:
        UnsupportedError: no CUDA device, several processes, or attention whose launches change from step to step.
    """
    choice = choose_backend(config.model)
    if device.type != "cuda":
        raise UnsupportedError(f"cuda_graphs: the model is on {device.type}; leave --cuda-graphs away")
    if config.parallel.tensor > 1:
        raise UnsupportedError(f"cuda_graphs: parallel.tensor={config.parallel.tensor}; leave --cuda-graphs away")
    if not takes_triton(choice.name, config.model.head_size):
        raise UnsupportedError(f"cuda_graphs: model.attention={choice}; they need triton")


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What repeats ``step``, which is not run yet; each time its result is in the same tensor.

    Raises:
        OutOfMemoryError: a graph has its own memory beside what the steps so far took; they still run.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer context puts the stream back where capturing fails at its end, which the inner one does not. Other
    # threads go on allocating for what they read ahead.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Steps:
    """One token more of every sequence of a cache, step after step."""

    def __init__(self, decoder: Decoder, cache: CachePlan, *, graphs: bool = False) -> None:
        """``graphs``: see :func:`check_graphs`."""
        self.decoder, self.cache, self.graphs = decoder, cache, graphs
        self._forget()

    def _forget(self) -> None:
        self._shape, self._until_capture = self.cache.shape, CAPTURE_AFTER if self.graphs else math.inf
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, newest_B: Tensor) -> Tensor:
        """Logits ``[B, vocab_size]`` behind the newest token of each sequence; the next call may overwrite them."""
        if self.cache.shape is not self._shape:
            self._forget()
        if self._replay is None and self._until_capture <= 0:
            self._capture(newest_B)
        if self._replay is None:
            self._until_capture -= 1
            self.cache.step()
            return self.decoder(newest_B[:, None], self.cache)
        self._newest_B.copy_(newest_B)
        self.cache.count_step()
        return self._replay()

    def _capture(self, newest_B: Tensor) -> None:
        """Where a graph finds no memory, this batch goes on without one."""
        self._newest_B = newest_B.clone()
        try:
            self._replay = capture(self._on_device)
        except torch.OutOfMemoryError:
            self._until_capture = math.inf
            print("no memory left for a CUDA graph: these sequences go on without", file=sys.stderr, flush=True)

    def _on_device(self) -> Tensor:
        self.cache.step_on_device()
        return self.decoder(self._newest_B[:, None], self.cache)
