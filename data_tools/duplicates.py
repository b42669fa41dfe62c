"""Which documents of a corpus repeat which: by sorted runs of keys, in parts of the key range, in bounded memory.

Each block of documents gives one run, sorted by key. A part takes its range of keys from all runs, so that equal keys
meet; it never holds more than its share. Documents are numbered through the corpus; of alike ones the first is kept.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_tools.minhash import MinHash
from megatron_m3.manifest import block_name, map_block

PAIRS_AT_A_TIME = 1 << 14
"""Pairs whose signatures are compared at a time."""
LEAST_JOINED = 1 << 18
"""Pairs that are gathered before they are joined to the groups, at least."""
ROUNDS = 64
"""Most documents of a bucket that others are compared with."""
EMPTY = np.zeros((0, 2), np.int64)


class Runs:
    """The runs of all blocks of a folder, mapped when asked for."""

    def __init__(self, folder: Path, num_blocks: int) -> None:
        self.folder, self.num_blocks = folder, num_blocks

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return map_block(self.folder / block_name(index))

    def part(self, part: int, num_parts: int, names: Sequence[str]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Number of each block, and its arrays ``names`` where ``key`` lies in the part's range; none stays mapped."""
        low, high = ((1 << 64) * edge // num_parts for edge in (part, part + 1))
        for index in range(self.num_blocks):
            run = self[index]
            first = int(np.searchsorted(run["key"], np.uint64(low)))
            last = len(run["key"]) if high >> 64 else int(np.searchsorted(run["key"], np.uint64(high)))
            yield index, [run[name][first:last].copy() for name in names]


def exact_pairs(runs: Runs, first_documents: np.ndarray, part: int, num_parts: int) -> np.ndarray:
    """int64 [pairs, 2]: documents whose 128-bit hash an earlier one has, and the first that has it, in order."""
    found = [(key, rest, row + first_documents[index])
             for index, (key, rest, row) in runs.part(part, num_parts, ("key", "rest", "row"))]
    key, rest, document = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((rest, key))
    key, rest, document = key[order], rest[order], document[order]
    begins = np.ones(len(key), bool)
    begins[1:] = (key[1:] != key[:-1]) | (rest[1:] != rest[:-1])
    firsts = document[begins][np.cumsum(begins) - 1]
    return in_order(np.stack([document, firsts], axis=1)[~begins])


def in_order(pairs: np.ndarray) -> np.ndarray:
    """Pairs sorted by their first column, each once."""
    return np.unique(pairs, axis=0) if len(pairs) else EMPTY


class NearPairs:
    """Finds the pairs of documents whose signatures agree in a band, and in enough values."""

    def __init__(self, runs: Runs, first_documents: np.ndarray, minhash: MinHash) -> None:
        self.runs, self.first_documents, self.minhash = runs, first_documents, minhash

    def find(self, part: int, num_parts: int) -> np.ndarray:
        """int64 [pairs, 2]: documents that an earlier one is nearly the same as, and that one, in order."""
        found = [(key, row + self.first_documents[index])
                 for index, (key, row) in self.runs.part(part, num_parts, ("key", "row"))]
        key, document = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(key, kind="stable")
        key, document = key[order], document[order]
        pairs = [EMPTY]
        for _ in range(ROUNDS):
            key, document = _in_buckets(key, document)
            if not len(key):
                break
            begins = np.append(True, key[1:] != key[:-1])
            leaders = document[begins][np.cumsum(begins) - 1]
            candidates = np.stack([document, leaders], axis=1)
            alike = np.zeros(len(key), bool)
            alike[~begins] = self._are_alike(candidates[~begins])
            pairs.append(candidates[alike])
            left = ~(alike | begins)
            key, document = key[left], document[left]
        return in_order(np.concatenate(pairs))

    def _are_alike(self, pairs: np.ndarray) -> np.ndarray:
        """bool [pairs]: whether the estimated similarity is at least the threshold; each pair is compared once."""
        distinct, places = np.unique(pairs, axis=0, return_inverse=True)
        alike = np.zeros(len(distinct), bool)
        for first in range(0, len(distinct), PAIRS_AT_A_TIME):
            some = distinct[first : first + PAIRS_AT_A_TIME]
            documents, where = np.unique(some, return_inverse=True)
            signatures = self._signatures(documents)[where.reshape(some.shape)]
            share = (signatures[:, 0] == signatures[:, 1]).mean(axis=1)
            alike[first : first + len(some)] = share >= self.minhash.threshold
        return alike[places.reshape(-1)]

    def _signatures(self, documents: np.ndarray) -> np.ndarray:
        """uint32 [documents, num_perm]; the documents are in order."""
        blocks = np.searchsorted(self.first_documents, documents, side="right") - 1
        signatures = np.empty((len(documents), self.minhash.num_perm), np.uint32)
        for block in np.unique(blocks):
            run, here = self.runs[int(block)], blocks == block
            places = np.searchsorted(run["signed"], documents[here] - self.first_documents[block])
            signatures[here] = run["signatures"][places]
        return signatures


def _in_buckets(key: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only what shares its key with another."""
    same = key[1:] == key[:-1]
    keep = np.append(same, False) | np.insert(same, 0, False) if len(key) else np.zeros(0, bool)
    return key[keep], document[keep]


def join(parts: Iterator[np.ndarray]) -> np.ndarray:
    """int64 [documents, 2]: each document that is not the first of its group, and that first, in order of documents.

    Takes pairs part by part; holds the groups so far and about as many pairs again.
    """
    groups, waiting, held = EMPTY, [EMPTY], 0
    for pairs in parts:
        waiting.append(pairs)
        held += len(pairs)
        if held > max(len(groups), LEAST_JOINED):
            groups, waiting, held = _components(np.concatenate([groups, *waiting])), [EMPTY], 0
    return _components(np.concatenate([groups, *waiting]))


def _components(pairs: np.ndarray) -> np.ndarray:
    """The connected components of a graph: each node but the least of its component, and that least one."""
    nodes, ends = np.unique(pairs, return_inverse=True)
    one, other = ends.reshape(pairs.shape).T
    root = np.arange(len(nodes))
    while True:
        a, b = root[one], root[other]
        if (a == b).all():
            break
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root != root[root]).any():
            root = root[root]
    return np.stack([nodes, nodes[root]], axis=1)[root != np.arange(len(nodes))]
