"""Which FAISS index for how many vectors, and its making in pieces: train, encode, add, tune.

A file of an index depends in its last bits on the number of threads, as matrix products do. What several processes
share is therefore done by one thread each.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from megatron_m3.errors import ConfigError
from megatron_m3.platform.faiss_factory import faiss_factory
from megatron_m3.platform.threads import one_faiss_thread

FLAT_LIMIT = 200_000
"""Most vectors that are searched one by one unless another index is asked for."""
FULL_BYTES = 16 << 30
"""Most bytes of vectors that are kept as they are; more are compressed by a product quantizer."""
CODE_BYTES = 64
"""Of a compressed vector."""
SAMPLE_PER_LIST, LEAST_SAMPLE = 40, 100_000
"""Vectors to train on: FAISS wants 39 for an inverted list, and 10 thousand for a product quantizer."""
BATCH = 8192
"""Vectors encoded at a time."""
FAISS_PLACE = re.compile(r"^Error in .*? at \S+:\d+: ")
"""Where in its sources FAISS met an error."""
GAIN = 0.002
"""Recall that reading four times as much must bring, where vectors are compressed, to go on."""


def num_lists(count: int) -> int:
    """Inverted lists for ``count`` vectors: about 4 * sqrt(count)."""
    return int(2 ** round(np.log2(4 * count**0.5)))


def choose_factory(count: int, size: int) -> str:
    """FAISS factory string for ``count`` vectors of ``size`` numbers: the most exact that is still quick and fits."""
    if count <= FLAT_LIMIT:
        return "Flat"
    if 4 * count * size <= FULL_BYTES:
        return f"IVF{num_lists(count)},Flat"
    parts = max(1, min(CODE_BYTES, size // 4))
    return f"OPQ{parts}_{min(size, 4 * parts)},IVF{num_lists(count)},PQ{parts}"


def make_faiss(factory: str, size: int, count: int) -> Any:
    """An empty, untrained index for inner products of ``count`` vectors.

    Raises:
        ConfigError: a factory string that FAISS refuses, or more lists than vectors.
    """
    import faiss

    with refusals(factory, size, count):
        index = faiss_factory(factory, size, faiss.METRIC_INNER_PRODUCT)
    lists = _lists(index)
    if lists is not None and lists.nlist > count:
        raise ConfigError(f"factory={factory}: has more lists than the {count} vectors; try Flat")
    return index


@contextlib.contextmanager
def refusals(factory: str, size: int, count: int) -> Iterator[None]:
    """What FAISS refuses meanwhile is an error that names ``factory``.

    Raises:
        ConfigError: it refused something.
    """
    try:
        yield
    except RuntimeError as error:
        why = FAISS_PLACE.sub("", str(error).strip().splitlines()[0]).rpartition("Error: ")[2]
        raise ConfigError(f"factory={factory}: FAISS refuses it for {count} vectors of {size} numbers ({why}); "
                          "try Flat") from None


def memory(index: Any, count: int) -> int:
    """Bytes that ``index`` takes with ``count`` vectors, on disk and in memory, but for tables of fixed size."""
    import faiss

    lists, inner = _lists(index), _inner(index)
    if lists is not None:
        return int(count * (lists.code_size + 8) + 4 * lists.nlist * lists.d)
    if isinstance(inner, faiss.IndexHNSW):
        hnsw: Any = inner.hnsw
        return int(count * 4 * (inner.d + hnsw.nb_neighbors(0)))
    return int(count * index.sa_code_size())


def sample_size(index: Any) -> int:
    """Vectors that ``index`` should be trained on; 0 for one that is not trained."""
    if index.is_trained:
        return 0
    lists = _lists(index)
    return max(LEAST_SAMPLE, SAMPLE_PER_LIST * lists.nlist if lists is not None else 0)


def train_faiss(factory: str, size: int, sample: np.ndarray) -> Any:
    """An empty index trained on ``sample``, float32 [N, size], on GPUs where FAISS has them.

    Raises:
        ConfigError: a factory string that FAISS refuses, or too few vectors to train it.
    """
    import faiss

    index = make_faiss(factory, size, len(sample))
    if index.is_trained:
        return index
    lists = _lists(index)
    if lists is not None and faiss.get_num_gpus():
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(lists.d, lists.quantizer.metric_type))
        lists.clustering_index = on_gpus
    with refusals(factory, size, len(sample)):
        index.train(sample)
    if lists is not None:
        lists.clustering_index = None
    return index


def gives_codes(index: Any) -> bool:
    """Whether vectors can be encoded by one process and added by another: inverted lists, but for packed ones."""
    import faiss

    inner = _inner(index)
    return isinstance(inner, faiss.IndexIVF) and not isinstance(inner, faiss.IndexIVFFastScan)


def encode(index: Any, vectors: np.ndarray) -> np.ndarray:
    """List and code of each vector, uint8 [N, bytes], by one thread, or by GPUs and one thread."""
    import faiss

    lists = _lists(index)
    quantizer = on_gpus = lists.quantizer
    if faiss.get_num_gpus() and isinstance(faiss.downcast_index(quantizer), faiss.IndexFlat):
        on_gpus = faiss.index_cpu_to_all_gpus(quantizer)
    lists.quantizer = on_gpus
    try:
        with one_faiss_thread():
            return np.concatenate([index.sa_encode(np.ascontiguousarray(vectors[first : first + BATCH]))
                                   for first in range(0, len(vectors), BATCH)])
    finally:
        lists.quantizer = quantizer


def add_codes(index: Any, blocks: Callable[[], Iterable[np.ndarray]]) -> None:
    """Add what :func:`encode` gave, block after block; the lists get their room first, so that none grows by moving."""
    import faiss

    inner = _inner(index)
    lists = faiss.downcast_InvertedLists(inner.invlists)
    width, sizes = inner.coarse_code_size(), np.zeros(inner.nlist, np.int64)
    for codes in blocks():
        numbers = np.zeros((len(codes), 8), np.uint8)
        numbers[:, :width] = codes[:, :width]
        sizes += np.bincount(numbers.view("<u8")[:, 0].astype(np.int64), minlength=inner.nlist)
    for number, size in enumerate(sizes.tolist()):
        lists.resize(number, size)
        lists.resize(number, 0)
    for codes in blocks():
        inner.add_sa_codes(np.ascontiguousarray(codes))
    index.ntotal = inner.ntotal


def tune(index: Any, wanted: float, recall: Callable[[], float]) -> dict[str, Any]:
    """Search as widely as the ``wanted`` recall takes, or as still helps; returns the recall and what it took."""
    import faiss

    inner = _inner(index)
    owner, name, most = _lists(index), "nprobe", 0
    if owner is not None:
        most = owner.nlist
    elif isinstance(inner, faiss.IndexHNSW):
        owner, name, most = inner.hnsw, "efSearch", index.ntotal
    else:
        return {"recall": recall()}
    exact, tried = isinstance(inner, faiss.IndexIVFFlat | faiss.IndexHNSWFlat), [(getattr(owner, name), recall())]
    while tried[-1][1] < wanted and tried[-1][0] < most:
        setattr(owner, name, min(2 * tried[-1][0], most))
        tried.append((getattr(owner, name), recall()))
        if not exact and len(tried) > 2 and tried[-1][1] < tried[-3][1] + GAIN:
            break
    best = max(found for _, found in tried)
    enough = wanted if best >= wanted else best - GAIN
    value, found = next(one for one in tried if one[1] >= enough)
    setattr(owner, name, value)
    took = {"lists": most, "lists_read": value} if name == "nprobe" else {"ef_search": value}
    return took | {"recall": found}


def _lists(index: Any) -> Any:
    """The part of an index that has inverted lists, or None."""
    import faiss

    return faiss.try_extract_index_ivf(index)


def _inner(index: Any) -> Any:
    """The index that gets the transformed vectors."""
    import faiss

    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index
