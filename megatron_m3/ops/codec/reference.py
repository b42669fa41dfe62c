"""Vector codecs: plain numbers, or any FAISS codec given by its factory string (section 3.3, appendix B)."""

import math
import re
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.ops.codec.product import ProductCode
from megatron_m3.platform.faiss_factory import faiss_factory
from megatron_m3.platform.threads import one_faiss_thread

Vectors = np.ndarray | Tensor
POINTS_PER_CENTROID = 39
"""FAISS's own floor for clustering."""


class VectorCodec(Protocol):
    """Encodes float32 vectors [N, D] as uint8 [N, code_bytes] and decodes them."""

    code_bytes: int

    def to(self, device: torch.device) -> "VectorCodec":
        """The same codec with its tables on ``device``, where it then computes, as far as it can."""

    def encode(self, vectors: Vectors) -> np.ndarray:
        """Codes of vectors, on the device of the codec or another."""

    def decode_into(self, codes: np.ndarray, out: Tensor) -> None:
        """Write the vectors of codes [..., code_bytes] to ``out`` [..., D], of any dtype and strides, on its device."""


class RawVectors:
    """The numbers themselves, as fp32 or bf16."""

    def __init__(self, head_size: int, dtype: Literal["fp32", "bf16"]) -> None:
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.code_bytes = head_size * self.dtype.itemsize

    def to(self, device: torch.device) -> Self:
        """The same: there are no tables."""
        return self

    def encode(self, vectors: Vectors) -> np.ndarray:
        """Codes of vectors; bf16 rounds to nearest."""
        numbers = torch.as_tensor(vectors).to(self.dtype).contiguous()
        return numbers.view(torch.uint8).view(len(vectors), self.code_bytes).cpu().numpy()

    def decode_into(self, codes: np.ndarray, out: Tensor) -> None:
        """Write the numbers to ``out``."""
        out.copy_(_tensor(codes).view(self.dtype))


class Fp8Vectors:
    """A byte a number: e4m3, times a scale that all vectors share."""

    dtype = torch.float8_e4m3fn

    def __init__(self, head_size: int, scale: float) -> None:
        """Numbers are stored as multiples of ``scale``, a power of two, up to 448; larger ones become 448."""
        self.code_bytes, self.scale = head_size, scale

    @classmethod
    def train(cls, vectors: np.ndarray) -> Self:
        """With the scale that leaves the largest number of ``vectors`` half of the range or more, at most all of it."""
        largest = float(np.abs(vectors).max(initial=0.0)) or 1.0
        return cls(vectors.shape[1], 2.0 ** math.ceil(math.log2(largest / torch.finfo(cls.dtype).max)))

    def to(self, device: torch.device) -> Self:
        """The same: there are no tables."""
        return self

    def encode(self, vectors: Vectors) -> np.ndarray:
        """Codes of vectors, rounded to nearest."""
        most = torch.finfo(self.dtype).max
        numbers = (torch.as_tensor(vectors) / self.scale).clamp_(-most, most)
        return numbers.to(self.dtype).view(torch.uint8).contiguous().cpu().numpy()

    def decode_into(self, codes: np.ndarray, out: Tensor) -> None:
        """Write the numbers to ``out``."""
        out.copy_(_tensor(codes).view(self.dtype)).mul_(self.scale)


class FaissVectors:
    """A trained FAISS index used as a codec: the codes of ``sa_encode``, the vectors of ``sa_decode``.

    Product codes are computed by :class:`ProductCode`, several times as fast; others by FAISS, always on the CPU.
    """

    def __init__(self, index: Any, product: ProductCode | None = None) -> None:
        """``product`` are the tables, if they are there already."""
        self.index, self.code_bytes = index, int(index.sa_code_size())
        self.product = product or ProductCode.of(index)

    def to(self, device: torch.device) -> Self:
        """The same codec with the tables of product codes on ``device``."""
        return type(self)(self.index, self.product and self.product.to(device))

    @classmethod
    def train(cls, factory: str, vectors: np.ndarray) -> Self:
        """Train on float32 vectors [N, D]; one thread, since FAISS's sums depend on the number of threads.

        Raises:
            ConfigError: no such construction for this head size, or one that needs more vectors.
        """
        index = make_index(factory, vectors.shape[1])
        if len(vectors) < vectors_needed(factory):
            raise ConfigError(f"codec={factory}: needs {vectors_needed(factory):,} vectors, there are {len(vectors):,}")
        with one_faiss_thread():
            index.train(np.ascontiguousarray(vectors, np.float32))
        return cls(index)

    def encode(self, vectors: Vectors) -> np.ndarray:
        """Codes of vectors, which are finite."""
        numbers = torch.as_tensor(vectors).float().contiguous()
        if self.product:
            return self.product.encode(numbers.to(self.product.device)).cpu().numpy()
        return self.index.sa_encode(numbers.cpu().numpy())

    def decode_into(self, codes: np.ndarray, out: Tensor) -> None:
        """Write the vectors that codes stand for to ``out``."""
        if self.product and self.product.device == out.device:
            self.product.decode(_tensor(codes).to(out.device), out)
        else:
            vectors = self.index.sa_decode(np.ascontiguousarray(codes).reshape(-1, self.code_bytes))
            out.copy_(torch.from_numpy(vectors).view(out.shape))

    def to_bytes(self) -> bytes:
        """The trained index, as FAISS stores it."""
        import faiss

        return bytes(faiss.serialize_index(self.index))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """A codec from :meth:`to_bytes`.

        Raises:
            ArtifactError: the bytes are not a FAISS index.
        """
        import faiss

        try:
            return cls(faiss.deserialize_index(np.frombuffer(data, np.uint8)))
        except RuntimeError:
            raise ArtifactError("not a FAISS codec; build the bank again") from None


def make_index(factory: str, head_size: int) -> Any:
    """An untrained FAISS index for vectors of ``head_size`` numbers.

    Raises:
        ConfigError: no such construction, none for this size, or one that is not a standalone codec.
    """
    import faiss

    try:
        index = faiss_factory(factory, head_size, faiss.METRIC_L2)
        index.sa_code_size()
    except RuntimeError as error:
        reason = re.split(r"Error: |\.cpp:\d+: ", re.sub(r"\s+", " ", str(error)))[-1].strip()
        raise ConfigError(
            f"codec={factory}: FAISS makes no standalone codec of it for head size {head_size} ({reason[:120]}); give "
            "auto, none, or another factory string"
        ) from None
    whole: Any = index
    inner = faiss.downcast_index(whole.index if hasattr(whole, "chain") else whole)
    if hasattr(inner, "do_polysemous_training"):
        # reorders centroids for search by Hamming distance: minutes of work that decoding has no use for
        inner.do_polysemous_training = False
    return index


def vectors_needed(factory: str) -> int:
    """Fewest training vectors for a factory string: 39 for each centroid of its largest codebook."""
    centroids = 1
    for part in factory.split(","):
        name, numbers = re.match(r"([A-Za-z]*)([\dx]*)", part).groups()  # type: ignore[union-attr]
        if name.startswith("IVF"):
            centroids = max(centroids, int(numbers or 1))
        elif name.endswith(("PQ", "RQ", "LSQ", "Residual")):
            # OPQ trains a product quantizer of 8 bits; others say their bits after the last x
            bits = 8 if name == "OPQ" or "x" not in numbers else int(numbers.split("x")[-1])
            centroids = max(centroids, 2**bits)
    return POINTS_PER_CENTROID * centroids if centroids > 1 else 1


def codebook_bytes(factory: str, head_size: int) -> int:
    """About the bytes of a trained codec by its factory string: rotations and codebooks, fp32."""
    numbers = 0
    for part in factory.split(","):
        name, sizes = re.match(r"([A-Za-z]*)([\dx_]*)", part).groups()  # type: ignore[union-attr]
        count, _, bits = sizes.partition("x")
        if name.endswith(("RQ", "LSQ")):
            numbers += int(count or 1) * 2 ** int(bits or 8) * head_size
        elif name == "Residual" and not bits:
            numbers += int(count or 1) * head_size
        elif name in ("PQ", "Residual"):  # products: a codebook for each part of a vector
            numbers += 2 ** int(bits or 8) * head_size
        else:
            numbers += 2 * head_size if name.startswith("SQ") else head_size**2
    return 4 * numbers


def _tensor(codes: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(codes))
