"""The codec of a bank: how the key and the value of a kept token become a few bytes (section 3.3, appendix B).

Three kinds: the numbers themselves, whole or in 8 bits; a FAISS construction, with codebooks of their own for keys and
for values (keys carry the rotation of RoPE and a few large channels, values do not); and ``KLTn``, which codes key and
value together by a transform of each layer and head, see :mod:`megatron_m3.memory.joint_codec`.

A *list* is what one head of one layer holds of a reference: codes of its kept tokens. Letter C: lists, by layer and
head; heads that hold no memory in a layer have none there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from megatron_m3.errors import M3Error
from megatron_m3.manifest import Manifest, hash_file, write_manifest
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.ops.codec import FaissVectors, Fp8Vectors, RawVectors, VectorCodec

KIND, SCHEMA = "codec", 3
Dtype = Literal["fp32", "bf16"]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """Turns explicit memories into bytes and back, on a device; the bytes themselves are on the CPU."""

    name: str
    """none, fp8, KLT and a number, or the FAISS factory string."""
    head_size: int
    held_LG: Tensor | None = None
    """Which heads hold memory in which memory layers, bool; None where all do. The bank says it, not the files."""
    device: torch.device = CPU
    """Where it computes."""
    kind: ClassVar[str]

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same codec on ``device``. Codes of another kind of device may differ where two are as good."""

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """Bytes of the key and the value of one kept token."""

    @abstractmethod
    def encode_lists(self, kv_NCXKD: Tensor, positions_NCK: Tensor) -> np.ndarray:
        """Codes uint8 [N, C, K * token_bytes]; those of empty slots may be anything."""

    @abstractmethod
    def decode_lists(
        self, codes_NCB: np.ndarray, positions_NCK: Tensor, heads: slice, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Keys and values of the lists of ``heads``, [N, C, 2, K, D]; of empty slots they may be anything."""

    @abstractmethod
    def empty_lists(self, codes_NCB: np.ndarray, valid_NK: np.ndarray) -> np.ndarray:
        """The codes with 0 where a slot is empty."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What it was trained to, by file name."""

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What :meth:`from_files` needs beside name and head size."""

    def encode(self, memories: ExplicitMemories) -> np.ndarray:
        """Codes uint8 [N, C, K * token_bytes], 0 in empty slots.

        Raises:
            M3Error: a key or value is not finite.
        """
        check_finite(memories)
        held_LG = self._held(memories.positions)
        kv_NLGXKD = memories.kv.to(self.device).transpose(2, 3)
        codes = self.encode_lists(kv_NLGXKD[:, held_LG], memories.positions[:, held_LG])
        return self.empty_lists(codes, memories.valid_slots().numpy())

    def decode(
        self, codes_NCB: np.ndarray, positions_NLGK: Tensor, num_kept_N: Tensor, heads: slice = slice(None),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Keys and values of the kv heads ``heads``, [N, L, 2, G, K, D], on the codec's device.

        They are 0 in empty slots, and where a head holds no memory. The codes are of the lists of ``heads`` alone.
        """
        held_LG = self._held(positions_NLGK, heads)
        kv_NCXKD = self.decode_lists(codes_NCB, positions_NLGK[:, held_LG], heads, dtype)
        empty_NK = torch.arange(kv_NCXKD.shape[3]) >= num_kept_N[:, None]
        if empty_NK.any():
            kv_NCXKD.masked_fill_(empty_NK[:, None, None, :, None].to(self.device), 0)
        if held_LG.all():
            return kv_NCXKD.unflatten(1, held_LG.shape).transpose(2, 3)
        kv_NLGXKD = kv_NCXKD.new_zeros(len(kv_NCXKD), *held_LG.shape, *kv_NCXKD.shape[2:])
        kv_NLGXKD[:, held_LG] = kv_NCXKD
        return kv_NLGXKD.transpose(2, 3)

    def _held(self, positions_NLGK: Tensor, heads: slice = slice(None)) -> Tensor:
        """Which of ``heads``, whose positions are given, hold memory in which memory layers."""
        if self.held_LG is None:
            return torch.ones(positions_NLGK.shape[1:3], dtype=torch.bool)
        return self.held_LG[:, heads]

    def round_trip(self, memories: ExplicitMemories) -> ExplicitMemories:
        """Memories as they come back from a bank with this codec."""
        kv = self.decode(self.encode(memories), memories.positions, memories.num_kept)
        return ExplicitMemories(kv=kv, positions=memories.positions, num_kept=memories.num_kept)

    def errors(self, memories: ExplicitMemories) -> tuple[float, float]:
        """Squared error of keys and of values, each as a share of their squared length."""
        held_LG = self._held(memories.positions)
        before, after = (some.kv.to(self.device).transpose(2, 3)[:, held_LG]
                         for some in (memories, self.round_trip(memories)))
        squares = [((after - before)[:, :, part].square().sum(), before[:, :, part].square().sum()) for part in (0, 1)]
        key, value = (float(error / total.clamp_min(1e-30)) for error, total in squares)
        return key, value

    def save(self, folder: Path, inputs: dict[str, str]) -> str:
        """Write the codec and its manifest to ``folder``; return its hash. ``inputs`` are what it was trained on."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (folder / name).write_bytes(data)
        settings = {"kind": self.kind, "name": self.name, "head_size": self.head_size, **self.settings()}
        files = {name: hash_file(folder / name) for name in self.files()}
        manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files)
        write_manifest(folder, manifest)
        return manifest.hash


@dataclass(frozen=True, kw_only=True)
class SeparateCodec(Codec):
    """Codec of keys and codec of values, of equal code size; the same for all layers and heads.

    A list is the codes of its keys, then those of its values.
    """

    dtype: Dtype
    """Numbers of the codec none."""
    key: VectorCodec
    value: VectorCodec
    kind: ClassVar[str] = "separate"

    @classmethod
    def none(cls, head_size: int, dtype: Dtype = "fp32", held_LG: Tensor | None = None) -> "SeparateCodec":
        """No compression."""
        raw = RawVectors(head_size, dtype)
        return cls(name="none", head_size=head_size, held_LG=held_LG, dtype=dtype, key=raw, value=raw)

    @property
    def token_bytes(self) -> int:
        """See :class:`Codec`."""
        return self.key.code_bytes + self.value.code_bytes

    def to(self, device: torch.device | str) -> Self:
        """See :class:`Codec`; constructions that only FAISS knows are coded on the CPU all the same."""
        device = torch.device(device)
        key = self.key.to(device)
        return replace(self, device=device, key=key, value=key if self.is_shared else self.value.to(device))

    @property
    def is_shared(self) -> bool:
        """Whether keys and values have one codebook."""
        return self.key is self.value

    def encode_lists(self, kv_NCXKD: Tensor, positions_NCK: Tensor) -> np.ndarray:
        """See :class:`Codec`."""
        parts = (self.key, self.value)
        N, C, _, K, D = kv_NCXKD.shape
        codes = [part.encode(kv_NCXKD[:, :, place].reshape(N * C * K, D)) for place, part in enumerate(parts)]
        return np.stack([one.reshape(N, C, K * one.shape[1]) for one in codes], 2).reshape(N, C, K * self.token_bytes)

    def decode_lists(
        self, codes_NCB: np.ndarray, positions_NCK: Tensor, heads: slice, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """See :class:`Codec`."""
        N, C, K = positions_NCK.shape
        codes_NCXKB = codes_NCB.reshape(N, C, 2, K, self.key.code_bytes)
        kv_NCXKD = torch.empty(N, C, 2, K, self.head_size, dtype=dtype, device=self.device)
        for place, part in enumerate((self.key, self.value)):
            part.decode_into(codes_NCXKB[:, :, place], kv_NCXKD[:, :, place])
        return kv_NCXKD

    def empty_lists(self, codes_NCB: np.ndarray, valid_NK: np.ndarray) -> np.ndarray:
        """See :class:`Codec`."""
        codes = codes_NCB.reshape(*codes_NCB.shape[:2], 2, valid_NK.shape[1], self.key.code_bytes)
        return (codes * valid_NK[:, None, None, :, None]).reshape(codes_NCB.shape)

    def files(self) -> dict[str, bytes]:
        """See :class:`Codec`."""
        named = {"keys_and_values": self.key} if self.is_shared else {"keys": self.key, "values": self.value}
        return {f"{name}.faiss": part.to_bytes() for name, part in named.items() if isinstance(part, FaissVectors)}

    def settings(self) -> dict[str, object]:
        """See :class:`Codec`."""
        scales = [part.scale for part in (self.key, self.value) if isinstance(part, Fp8Vectors)]
        return {"dtype": self.dtype, "shared": self.is_shared} | ({"scales": scales} if scales else {})

    @classmethod
    def from_files(
        cls, settings: dict[str, object], files: dict[str, bytes], held_LG: Tensor | None
    ) -> "SeparateCodec":
        """The codec that was saved."""
        size: int = settings["head_size"]  # type: ignore[assignment]
        dtype: Dtype = settings["dtype"]  # type: ignore[assignment]
        if settings["name"] == "none":
            return cls.none(size, dtype, held_LG)
        parts: list[VectorCodec]
        if settings["name"] == "fp8":
            parts = [Fp8Vectors(size, scale) for scale in settings["scales"]]  # type: ignore[attr-defined]
        else:
            parts = [FaissVectors.from_bytes(files[name]) for name in sorted(files)]
        first, *others = parts[:1] if settings["shared"] else parts
        return cls(name=str(settings["name"]), head_size=size, held_LG=held_LG, dtype=dtype, key=first,
                   value=others[0] if others else first)


def check_finite(memories: ExplicitMemories) -> None:
    """Refuse memories of a model that has diverged.

    Raises:
        M3Error: a key or value is not finite.
    """
    if not torch.isfinite(memories.kv).all():
        raise M3Error("checkpoint: its memories are not finite; the training diverged, take another checkpoint")
