"""Which documents of a corpus repeat which: by sorted runs of keys, in parts of the key range, in bounded memory.

Each block of documents gives one run, sorted by key. A part takes its range of keys from all runs, so that equal keys
meet; it never holds more than its share. Documents are numbered through the corpus; of alike ones the first is kept.
"""

import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from data_tools.minhash import MinHash
from megatron_m3.manifest import BlockFolder, map_block

PAIRS_AT_A_TIME = 1 << 14
"""Pairs whose signatures are compared at a time."""
LEAST_JOINED = 1 << 18
"""Pairs that are gathered before they are joined to the groups, at least."""
ROUNDS = 64
"""Most documents of a bucket that others are compared with."""
HEADER_BYTES = 1 << 12
"""More than the header of a block takes."""
EMPTY = np.zeros((0, 2), np.int64)


class Runs:
    """The runs of all blocks, mapped when asked for; what is read of one is compared with a checksum of just that."""

    def __init__(self, folder: BlockFolder, num_blocks: int, num_parts: int) -> None:
        self.folder, self.num_blocks, self.num_parts = folder, num_blocks, num_parts
        self._checked: set[int] = set()

    def write(self, index: int, run: Mapping[str, np.ndarray], **signed: np.ndarray) -> None:
        """Write a block: arrays sorted by ``key``, and maybe the ``signatures`` of its documents ``rows``."""
        starts = np.array([(1 << 64) * part // self.num_parts for part in range(self.num_parts)], np.uint64)
        edges = np.append(np.searchsorted(run["key"], starts), len(run["key"]))
        sums = [checksum(array[first:last] for array in run.values()) for first, last in itertools.pairwise(edges)]
        checks = {"edges": edges, "sums": np.array(sums, np.uint32)}
        if signed:
            checks["row_sums"] = row_checksums(**signed)
        data = save({name: np.ascontiguousarray(array) for name, array in {**run, **checks, **signed}.items()})
        self.folder.write_bytes(index, data, {"header": zlib.crc32(header(data))})

    def part(self, part: int, names: Sequence[str]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Number of each block, and its arrays (all are named) of the part's range of keys; none stays mapped.

        Raises:
            ArtifactError: a block is damaged there.
        """
        for index in range(self.num_blocks):
            path, run = self._map(index)
            first, last = run["edges"][part : part + 2]
            found = [run[name][first:last].copy() for name in names]
            if checksum(found) != run["sums"][part]:
                raise self.folder.damaged(index, path)
            yield index, found

    def signatures(self, index: int, rows: np.ndarray) -> np.ndarray:
        """uint32 [N, num_perm]: of documents of a block, all signed, int64 [N] in order.

        Raises:
            ArtifactError: the block is damaged there.
        """
        path, run = self._map(index)
        places = np.searchsorted(run["rows"], rows).clip(max=len(run["rows"]) - 1)
        signatures = run["signatures"][places]
        if (row_checksums(rows.astype(np.uint32), signatures) != run["row_sums"][places]).any():
            raise self.folder.damaged(index, path)
        return signatures

    def _map(self, index: int) -> tuple[Path, dict[str, np.ndarray]]:
        path = self.folder.folder / self.folder.name(index)
        if index not in self._checked:
            with path.open("rb") as stream:
                start = header(stream.read(HEADER_BYTES))
            if zlib.crc32(start) != self.folder.read_info(index)["header"]:
                raise self.folder.damaged(index, path)
            self._checked.add(index)
        return path, map_block(path)


def header(data: bytes) -> bytes:
    """What a safetensors file says of its arrays, of its first bytes."""
    return data[: 8 + int.from_bytes(data[:8], "little")]


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """One CRC-32 for all arrays."""
    return functools.reduce(lambda total, array: zlib.crc32(np.ascontiguousarray(array).data, total), arrays, 0)


def row_checksums(rows: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """uint32 [N]: a CRC-32 of each document's row and signature."""
    pairs = zip(np.ascontiguousarray(signatures), rows.tolist(), strict=True)
    return np.fromiter((zlib.crc32(signature.data, row) for signature, row in pairs), np.uint32, len(rows))


def exact_pairs(runs: Runs, first_documents: np.ndarray, part: int) -> np.ndarray:
    """int64 [pairs, 2]: documents whose 128-bit hash an earlier one has, and the first that has it, in order."""
    found = [(key, rest, row + first_documents[index])
             for index, (key, rest, row) in runs.part(part, ("key", "rest", "row"))]
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

    def find(self, part: int) -> np.ndarray:
        """int64 [pairs, 2]: documents that an earlier one is nearly the same as, and that one, in order."""
        found = [(key, row + self.first_documents[index])
                 for index, (key, row) in self.runs.part(part, ("key", "row"))]
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
            here = blocks == block
            signatures[here] = self.runs.signatures(int(block), documents[here] - self.first_documents[block])
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
