"""FAISS's product codes with batched products: a rotation, layers of products of codebooks, packed bits.

Covers ``PQMxB``, ``ResidualMxB,PQMxB`` and ``ResidualK,PQMxB``, behind any linear steps that turn without stretching
(``OPQ``, ``PCA``, ``RR``): the paper's ``OPQ20_80,Residual2x14,PQ8x10`` among them. A vector is cut into parts, each
coded as the index of the nearest centroid of its codebook; the next layer does the same with what is left over.

What a vector is coded to does not depend on the others of its batch, nor on the number of threads.

Letters: N vectors, D their numbers, E numbers after the linear steps, P parts (of a layer, or of all), C centroids,
F numbers of a part, B bytes of a code.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from megatron_m3.ops.codec.nearest import Centroids, product_dtype

SCORES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Distances in memory at a time."""
WORD = 64
"""Bits of the words that codes are read by."""
ROWS = {"cpu": 2048, "cuda": 1 << 17}
"""Vectors decoded at a time."""
SHARED = 1 << 13
"""Fewest numbers or bytes that are worth a thread."""
TURN_ROWS = 256
"""Vectors turned at a time: always as many, since the order of a product's sums depends on it."""


@dataclass(frozen=True)
class Layer:
    """A product of codebooks, and where its indices stand in a code."""

    centroids_PCF: Tensor
    """float32."""
    offset: int
    """First bit of the first index; bits count from the lowest of the first byte."""
    bits: int
    """Of one index; the indices follow each other."""

    def reconstruct(self, index_PN: Tensor) -> Tensor:
        """The vectors [N, P * F] of indices."""
        found = [book.index_select(0, index) for book, index in zip(self.centroids_PCF, index_PN, strict=True)]
        return torch.cat(found, -1)


class ProductCode:
    """Tables of a trained product code on one device; encodes and decodes there."""

    def __init__(self, turn_ED: Tensor, shift_E: Tensor, layers: list[Layer], code_bytes: int) -> None:
        self.turn_ED, self.shift_E, self.layers, self.code_bytes = turn_ED, shift_E, layers, code_bytes
        self.device = turn_ED.device

    @classmethod
    def of(cls, index: Any) -> Self | None:
        """The code of a trained FAISS index, on the CPU; None where it is none of this family."""
        import faiss

        turn_ED, shift_E = torch.eye(index.d, dtype=torch.float64), torch.zeros(index.d, dtype=torch.float64)
        if isinstance(index, faiss.IndexPreTransform):
            chain: Any = index.chain
            for step in (faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())):
                if not isinstance(step, faiss.LinearTransform) or not step.is_orthonormal:
                    return None
                matrix = torch.from_numpy(faiss.vector_to_array(step.A)).view(step.d_out, step.d_in).double()
                turn_ED, shift_E = matrix @ turn_ED, matrix @ shift_E
                if step.have_bias:
                    shift_E = shift_E + torch.from_numpy(faiss.vector_to_array(step.b))
            index = faiss.downcast_index(index.index)
        layers = _layers(index)
        return cls(turn_ED, shift_E, layers, int(index.sa_code_size())) if layers else None

    def to(self, device: torch.device | str) -> "ProductCode":
        """The same code on ``device``."""
        layers = [Layer(layer.centroids_PCF.to(device), layer.offset, layer.bits) for layer in self.layers]
        return ProductCode(self.turn_ED.to(device), self.shift_E.to(device), layers, self.code_bytes)

    def encode(self, vectors_ND: Tensor) -> Tensor:
        """Codes uint8 [N, B] of finite float32 vectors."""
        codes_NB = torch.empty(len(vectors_ND), self.code_bytes, dtype=torch.uint8, device=self.device)
        assert self._centroids
        self._share(self._encode, vectors_ND, codes_NB)
        return codes_NB

    def _encode(self, vectors_ND: Tensor, codes_NB: Tensor) -> None:
        space, rows = self._space(len(vectors_ND))
        for code_NB, some_ND in zip(codes_NB.split(rows), vectors_ND.split(rows), strict=True):
            left_NE = self._turn(some_ND)
            indices: list[Tensor] = []
            for layer, centroids in zip(self.layers, self._centroids, strict=True):
                if indices:
                    left_NE = left_NE - self.layers[len(indices) - 1].reconstruct(indices[-1])
                parts_PNF = left_NE.unflatten(-1, (len(layer.centroids_PCF), -1)).transpose(0, 1)
                indices.append(centroids.nearest(parts_PNF, space))
            code_NB.copy_(self._pack(torch.cat(indices)))

    def decode(self, codes_NB: Tensor, out: Tensor) -> None:
        """Write the vectors of codes [..., B] to ``out`` [..., D], of any dtype and strides."""
        assert self._table
        self._share(self._decode, codes_NB, out)

    def _decode(self, codes_NB: Tensor, out: Tensor) -> None:
        step = max(1, ROWS[self.device.type] // max(1, codes_NB[:1].numel() // self.code_bytes))
        table, starts = self._table
        for code, vectors in zip(codes_NB.split(step), out.split(step), strict=True):
            rows_NP = self._unpack(code.reshape(-1, self.code_bytes)) + starts
            vectors.copy_(functional.embedding_bag(rows_NP, table, mode="sum").view(vectors.shape))

    def _share(self, work: Callable[[Tensor, Tensor], None], read: Tensor, written: Tensor) -> None:
        """``work(read, written)``, each thread on a part: single operations are too short to share."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        if threads == 1 or read.numel() < SHARED * threads:
            work(read, written)
            return
        size = -(-len(read) // threads)
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(work, read.split(size), written.split(size)))
        finally:
            torch.set_num_threads(threads)

    def _space(self, count: int) -> tuple[Tensor, int]:
        """Memory for distances, and how many vectors at a time it is enough for."""
        most = max(centroids.scores for centroids in self._centroids)
        rows = max(1, min(SCORES[self.device.type] // most, count))
        return torch.empty(rows * most, dtype=product_dtype(self.device), device=self.device), rows

    @functools.cached_property
    def _centroids(self) -> list[Centroids]:
        return [Centroids(layer.centroids_PCF, product_dtype(self.device)) for layer in self.layers]

    def _turn(self, vectors_ND: Tensor) -> Tensor:
        """Vectors after the linear steps, float32 [N, E]."""
        pieces = []
        for some_ND in vectors_ND.split(TURN_ROWS):
            padded = functional.pad(some_ND, (0, 0, 0, TURN_ROWS - len(some_ND))).double()
            pieces.append((padded @ self.turn_ED.T + self.shift_E)[: len(some_ND)].float())
        return torch.cat(pieces)

    @functools.cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """Of each index: the word of a code that it begins in, its first bit there, and its bits."""
        return [(*divmod(layer.offset + part * layer.bits, WORD), layer.bits)
                for layer in self.layers for part in range(len(layer.centroids_PCF))]

    def _pack(self, index_PN: Tensor) -> Tensor:
        """Codes of indices: bits one after another, the lowest first."""
        words_WN = index_PN.new_zeros(-(-8 * self.code_bytes // WORD), index_PN.shape[1])
        for index_N, (word, first, bits) in zip(index_PN, self._places, strict=True):
            words_WN[word] |= index_N << first
            if first + bits > WORD:
                words_WN[word + 1] |= index_N >> (WORD - first)
        octets_WNB = words_WN.view(torch.uint8).unflatten(-1, (-1, WORD // 8))
        return octets_WNB.transpose(0, 1).flatten(1)[:, : self.code_bytes]

    def _unpack(self, codes_NB: Tensor) -> Tensor:
        """Indices of codes, int64 [N, P]."""
        words_WN = functional.pad(codes_NB, (0, -self.code_bytes % (WORD // 8))).view(torch.int64).T.contiguous()
        index_PN = words_WN.new_empty(len(self._places), len(codes_NB))
        for index_N, (word, first, bits) in zip(index_PN, self._places, strict=True):
            torch.bitwise_right_shift(words_WN[word], first, out=index_N)
            if first + bits > WORD:
                # the shift has filled the upper bits with the sign
                index_N &= (1 << WORD - first) - 1
                index_N |= words_WN[word + 1] << WORD - first
            index_N &= (1 << bits) - 1
        return index_PN.T

    @functools.cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """What each index adds to a decoded vector, float32 [all C, D], and the first row of each part.

        Turning back is part of it, so that a vector is a sum of as many rows as it has indices.
        """
        rows, starts, total = [], [], 0
        for layer in self.layers:
            _, count, size = layer.centroids_PCF.shape
            for part, book in enumerate(layer.centroids_PCF.double()):
                rows.append(book @ self.turn_ED[part * size : (part + 1) * size])
                starts.append(total)
                total += count
        rows[0] -= self.shift_E @ self.turn_ED
        return torch.cat(rows).float(), torch.tensor(starts, device=self.device)


def _layers(index: Any) -> list[Layer]:
    """The layers of a FAISS index; none where it is no product code."""
    import faiss

    if type(index) is faiss.IndexPQ:
        return [_product(index.pq, 0)]
    if type(index) is not faiss.Index2Layer:
        return []
    quantizer: Any = index.q1
    first = faiss.downcast_index(quantizer.quantizer)
    second = _product(index.pq, 8 * index.code_size_1)
    if isinstance(first, faiss.MultiIndexQuantizer):
        return [_product(first.pq, 0), second]
    if type(first) is faiss.IndexFlatL2 and first.ntotal <= 1 << 16:
        centroids = torch.from_numpy(first.reconstruct_n(0, first.ntotal))
        return [Layer(centroids[None], 0, 8 * index.code_size_1), second]
    return []


def _product(pq: Any, offset: int) -> Layer:
    import faiss

    return Layer(torch.from_numpy(faiss.vector_to_array(pq.centroids)).view(pq.M, pq.ksub, pq.dsub), offset, pq.nbits)
