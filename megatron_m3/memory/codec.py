"""The codec of a bank: how each key and each value of a memory becomes a few bytes (section 3.3, appendix B).

Keys and values have codebooks of their own by default: keys carry the rotation of RoPE and a few large channels, values
do not, and one codebook for both would spend its centroids on the larger of the two.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from megatron_m3.errors import ArtifactError, ConfigError, M3Error
from megatron_m3.manifest import Manifest, check_files, hash_file, read_manifest, write_manifest
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.ops.codec import FaissVectors, RawVectors, VectorCodec, vectors_needed
from megatron_m3.ops.codec.reference import make_index

KIND, SCHEMA = "codec", 1


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Codec of keys and codec of values, of equal code size."""

    name: str
    """none, or the FAISS factory string."""
    head_size: int
    dtype: Literal["fp32", "bf16"]
    """Numbers of the codec none."""
    key: VectorCodec
    value: VectorCodec

    @classmethod
    def none(cls, head_size: int, dtype: Literal["fp32", "bf16"] = "fp32") -> Self:
        """No compression."""
        raw = RawVectors(head_size, dtype)
        return cls(name="none", head_size=head_size, dtype=dtype, key=raw, value=raw)

    @property
    def code_bytes(self) -> int:
        """Bytes of one key or value."""
        return self.key.code_bytes

    @property
    def is_shared(self) -> bool:
        """Whether keys and values have one codebook."""
        return self.key is self.value

    def encode(self, memories: ExplicitMemories) -> np.ndarray:
        """Codes uint8 [N, L, 2, G, K, bytes]; those of empty slots stand for nothing.

        Raises:
            M3Error: a key or value is not finite.
        """
        kv_NLXGKD = memories.kv
        if not torch.isfinite(kv_NLXGKD).all():
            raise M3Error("checkpoint: its memories are not finite; the training diverged, take another checkpoint")
        return np.stack(
            [_apply(part.encode, kv_NLXGKD[:, :, place].numpy()) for place, part in enumerate((self.key, self.value))],
            2,
        )

    def decode(self, codes_NLXGKB: np.ndarray, num_kept_N: Tensor) -> Tensor:
        """Keys and values, float32 [N, L, 2, G, K, D], 0 in empty slots."""
        parts = [_apply(part.decode, codes_NLXGKB[:, :, place]) for place, part in enumerate((self.key, self.value))]
        kv_NLXGKD = torch.from_numpy(np.stack(parts, 2))
        empty_NK = torch.arange(kv_NLXGKD.shape[4]) >= num_kept_N[:, None]
        return kv_NLXGKD.masked_fill_(empty_NK[:, None, None, None, :, None], 0)

    def round_trip(self, memories: ExplicitMemories) -> ExplicitMemories:
        """Memories as they come back from a bank with this codec."""
        kv = self.decode(self.encode(memories), memories.num_kept)
        return ExplicitMemories(kv=kv, positions=memories.positions, num_kept=memories.num_kept)

    def errors(self, memories: ExplicitMemories) -> tuple[float, float]:
        """Squared error of keys and of values, each as a share of their squared length."""
        after = self.round_trip(memories)
        squares = [((after.kv - memories.kv)[:, :, part].square().sum(), memories.kv[:, :, part].square().sum())
                   for part in (0, 1)]
        key, value = (float(error / max(total, torch.tensor(1e-30))) for error, total in squares)
        return key, value

    def save(self, folder: Path, inputs: dict[str, str]) -> str:
        """Write the codec and its manifest to ``folder``; return its hash. ``inputs`` are what it was trained on."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        named = {"keys_and_values": self.key} if self.is_shared else {"keys": self.key, "values": self.value}
        for name, part in named.items():
            if isinstance(part, FaissVectors):
                path = folder / f"{name}.faiss"
                path.write_bytes(part.to_bytes())
                files[path.name] = hash_file(path)
        settings = {"name": self.name, "head_size": self.head_size, "dtype": self.dtype, "shared": self.is_shared}
        manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files)
        write_manifest(folder, manifest)
        return manifest.hash

    @classmethod
    def load(cls, folder: Path) -> tuple[Self, str]:
        """A saved codec and its hash.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        manifest = read_manifest(folder, KIND, SCHEMA)
        check_files(folder, manifest, checksums=True, mend="remove the bank and build it again")
        settings = manifest.settings
        if settings["name"] == "none":
            return cls.none(settings["head_size"], settings["dtype"]), manifest.hash
        try:
            parts = {name: FaissVectors.from_bytes((folder / name).read_bytes()) for name in sorted(manifest.files)}
        except ArtifactError as error:
            raise ArtifactError(f"{folder}: {error}") from None
        first, *others = parts.values()
        return cls(name=settings["name"], head_size=settings["head_size"], dtype=settings["dtype"], key=first,
                   value=others[0] if others else first), manifest.hash


def check_codec(name: str, head_size: int) -> None:
    """Check that there is a codec ``name`` (auto, none or a FAISS factory string) for heads of ``head_size`` numbers.

    Raises:
        ConfigError: there is none.
    """
    if name not in ("auto", "none"):
        make_index(name, head_size)


def code_bytes(name: str, head_size: int) -> int:
    """Bytes of one key or value with the codec ``name``: none (bf16 numbers) or a FAISS factory string.

    Raises:
        ConfigError: there is no such codec.
    """
    return 2 * head_size if name == "none" else int(make_index(name, head_size).sa_code_size())


def train_codec(
    name: str, sample: ExplicitMemories, *, dtype: Literal["fp32", "bf16"] = "fp32", shared: bool = False
) -> Codec:
    """The codec ``name`` (auto, none or a FAISS factory string) for memories like ``sample``; same sample, same bytes.

    Raises:
        ConfigError: the sample holds fewer vectors than the construction needs, or FAISS does not know it.
    """
    head_size = sample.kv.shape[-1]
    if name == "none":
        return Codec.none(head_size, dtype)
    count = int(sample.num_kept.sum()) * sample.kv.shape[1] * sample.kv.shape[3]
    if name == "auto":
        name = choose_factory(head_size, count)
    if count < vectors_needed(name):
        make_index(name, head_size)
        raise ConfigError(
            f"codec={name}: needs {vectors_needed(name):,} keys to train on, the sample of {len(sample):,} references "
            f"has {count:,}; give a larger codec_sample, more references, or codec=auto"
        )
    if not torch.isfinite(sample.kv).all():
        raise M3Error("checkpoint: its memories are not finite; the training diverged, take another checkpoint")
    key, value = sample.vectors(0), sample.vectors(1)
    if shared:
        both = FaissVectors.train(name, np.concatenate([key, value]))
        return Codec(name=name, head_size=head_size, dtype=dtype, key=both, value=both)
    return Codec(name=name, head_size=head_size, dtype=dtype, key=FaissVectors.train(name, key),
                 value=FaissVectors.train(name, value))


def choose_factory(head_size: int, num_vectors: int) -> str:
    """The construction that ``auto`` stands for: the first of these that the head size and the data allow.

    1. ``OPQ{D/4}_{D},Residual2x14,PQ8x10``, the paper's 14 bytes, from 638,976 vectors on;
    2. ``Residual2x8,PQ16x6``, 14 bytes, from 9,984 vectors on (head sizes divisible by 16);
    3. ``Residual2x8,PQ8x8``, 10 bytes, from 9,984 vectors on (head sizes divisible by 8);
    4. ``Residual2x6,PQ16x6``, 14 bytes, from 2,496 vectors on (head sizes divisible by 16);
    5. ``SQ4``, half a byte a number, from 2 vectors on.
    """
    ladder = [
        (f"OPQ{head_size // 4}_{head_size},Residual2x14,PQ8x10", 8),
        ("Residual2x8,PQ16x6", 16),
        ("Residual2x8,PQ8x8", 8),
        ("Residual2x6,PQ16x6", 16),
    ]
    for factory, divisor in ladder:
        if head_size % divisor == 0 and num_vectors >= vectors_needed(factory):
            return factory
    return "SQ4"


def _apply(function: object, array: np.ndarray) -> np.ndarray:
    """A function of [N, columns] arrays applied to the last axis of ``array``."""
    out = function(np.ascontiguousarray(array).reshape(-1, array.shape[-1]))  # type: ignore[operator]
    return out.reshape(*array.shape[:-1], out.shape[-1])
