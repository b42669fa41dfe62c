"""FAISS's factory of indices, without the strings that it takes and then ends the process over."""

import re
from typing import Any

TOO_FEW = re.compile(r"(?<!\d)0+(?!\d)|HNSW0*1(?!\d)")
"""Any number of 0, such as in HNSW0 or PQ4x0, and one link: FAISS crashes when it trains or adds to such an index."""


def faiss_factory(factory: str, size: int, metric: int) -> Any:
    """``faiss.index_factory`` for vectors of ``size`` numbers.

    Raises:
        RuntimeError: FAISS refuses it, or would crash over it later.
    """
    import faiss

    found = TOO_FEW.search(factory)
    if found:
        raise RuntimeError(f"Error: {found[0]} is too few")
    return faiss.index_factory(size, factory, metric)
