"""The forward passes of a batch's steps, as CUDA graphs if that is wanted.

A step launches several hundred kernels, and launching them takes the host longer than running them takes a card. A
graph is launched at once. It repeats the same operations on the same tensors, so one serves until sequences join or
leave: what changes from step to step stands in tensors.
"""

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


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What repeats ``step``, which is not run yet, and the tensor in which its result then is."""
    graph = torch.cuda.CUDAGraph()
    # other threads go on allocating for what they read ahead
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result


class Steps:
    """One token more of every sequence of a cache, step after step."""

    def __init__(self, decoder: Decoder, cache: CachePlan, *, graphs: bool = False) -> None:
        """``graphs``: see :func:`check_graphs`."""
        self.decoder, self.cache, self.graphs = decoder, cache, graphs
        self._forget()

    def _forget(self) -> None:
        self._shape, self._unchanged = self.cache.shape, 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, newest_B: Tensor) -> Tensor:
        """Logits ``[B, vocab_size]`` behind the newest token of each sequence; the next call may overwrite them."""
        if self.cache.shape is not self._shape:
            self._forget()
        self._unchanged += 1
        if not self.graphs or self._unchanged <= CAPTURE_AFTER:
            self.cache.step()
            return self.decoder(newest_B[:, None], self.cache)
        if self._replay is None:
            self._newest_B = newest_B.clone()
            self._replay, self._logits_BV = capture(self._on_device)
        self._newest_B.copy_(newest_B)
        self.cache.count_step()
        self._replay()
        return self._logits_BV

    def _on_device(self) -> Tensor:
        self.cache.step_on_device()
        return self.decoder(self._newest_B[:, None], self.cache)
