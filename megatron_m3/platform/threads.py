"""How many threads a library computes with, for a while."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_faiss_thread() -> Iterator[None]:
    """FAISS computes with one thread meanwhile: the last bits of its sums depend on their number."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """The same for torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
