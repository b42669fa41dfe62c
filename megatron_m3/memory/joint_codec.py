"""The codec KLTn: the key and the value of a kept token in n bytes, by a transform of each memory layer and head.

Keys are turned back by their positions, which the record holds, so that a head's keys differ by their words alone; what
all tokens of a head have in common costs nothing; and bits go where a reader would notice an error most.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from megatron_m3.errors import ArtifactError
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.sensitivity import Sensitivity
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.model.rope import rotate
from megatron_m3.ops.codec.transform import TransformCode


@dataclass(frozen=True, kw_only=True)
class JointCodec(Codec):
    """One transform code for each memory layer and head. A list is the codes of its tokens."""

    num_heads: int
    """Key-value heads of the model."""
    code: TransformCode
    """Its classes are the lists, by layer and head."""
    frequency: Tensor
    """float64 [D/2]: angle of each pair of a key by which one position turns it."""
    kind: ClassVar[str] = "joint"

    @classmethod
    def train(
        cls, code_bytes: int, sample: ExplicitMemories, sensitivity: Sensitivity, held_LG: Tensor
    ) -> "JointCodec":
        """For memories like ``sample``, least wrong where ``sensitivity`` says that readers notice it."""
        size = sample.kv.shape[-1]
        kv_NCXKD = sample.kv.transpose(2, 3)[:, held_LG]
        every_CND = _by_class(_turn(kv_NCXKD, sample.positions[:, held_LG], sensitivity.frequency, -1))
        vectors_CND = every_CND[:, sample.valid_slots().flatten()]
        weights_CDD = torch.zeros(len(vectors_CND), 2 * size, 2 * size)
        values_CND = vectors_CND[..., size:] - vectors_CND[..., size:].mean(1, keepdim=True)
        value_CDD, query_CDD = sensitivity.value_LGDD[held_LG], sensitivity.query_LGDD[held_LG]
        spread_C = torch.einsum("cnd,cde,cne->c", values_CND, value_CDD, values_CND) / values_CND.shape[1]
        weights_CDD[:, :size, :size] = query_CDD * spread_C[:, None, None]
        weights_CDD[:, size:, size:] = value_CDD
        code = TransformCode.train(vectors_CND, weights_CDD, code_bytes)
        return cls(name=f"KLT{code_bytes}", head_size=size, held_LG=held_LG, num_heads=held_LG.shape[1], code=code,
                   frequency=sensitivity.frequency)

    @property
    def token_bytes(self) -> int:
        """See :class:`Codec`."""
        return self.code.code_bytes

    def encode_lists(self, kv_NCXKD: Tensor, positions_NCK: Tensor) -> np.ndarray:
        """See :class:`Codec`."""
        N, C, K = positions_NCK.shape
        codes_CNB = self.code.encode(_by_class(_turn(kv_NCXKD, positions_NCK, self.frequency, -1)))
        return np.ascontiguousarray(codes_CNB.reshape(C, N, K * self.token_bytes).transpose(1, 0, 2))

    def decode_lists(
        self, codes_NCB: np.ndarray, positions_NCK: Tensor, heads: slice, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """See :class:`Codec`."""
        N, C, K = positions_NCK.shape
        codes_CNB = codes_NCB.transpose(1, 0, 2).reshape(C, N * K, self.token_bytes)
        kv_CNKXD = self.code.decode(codes_CNB, self._classes(heads)).view(C, N, K, 2, self.head_size)
        return _turn(kv_CNKXD.permute(1, 0, 3, 2, 4), positions_NCK, self.frequency, 1).to(dtype)

    def _classes(self, heads: slice) -> Tensor:
        """Classes of the lists of ``heads``."""
        held_LG = self.held_LG
        if held_LG is None:
            held_LG = torch.ones(len(self.code.mean_CD) // self.num_heads, self.num_heads, dtype=torch.bool)
        class_LG = held_LG.flatten().cumsum(0).view(held_LG.shape) - 1
        return class_LG[:, heads][held_LG[:, heads]]

    def empty_lists(self, codes_NCB: np.ndarray, valid_NK: np.ndarray) -> np.ndarray:
        """See :class:`Codec`."""
        codes = codes_NCB.reshape(*codes_NCB.shape[:2], valid_NK.shape[1], self.token_bytes)
        return (codes * valid_NK[:, None, :, None]).reshape(codes_NCB.shape)

    def files(self) -> dict[str, bytes]:
        """See :class:`Codec`."""
        return {"keys_and_values.safetensors": save(self.code.tensors() | {"frequency": self.frequency})}

    def settings(self) -> dict[str, object]:
        """See :class:`Codec`."""
        return {"num_heads": self.num_heads}

    @classmethod
    def from_files(
        cls, settings: dict[str, object], files: dict[str, bytes], held_LG: Tensor | None
    ) -> "JointCodec":
        """The codec that was saved."""
        try:
            tensors = load(files["keys_and_values.safetensors"])
            frequency = tensors.pop("frequency")
            code = TransformCode(**tensors)
        except (KeyError, TypeError, ValueError):
            raise ArtifactError("not a transform code; build the bank again") from None
        return cls(name=str(settings["name"]), head_size=int(str(settings["head_size"])), held_LG=held_LG,
                   num_heads=int(str(settings["num_heads"])), code=code, frequency=frequency)


def _by_class(kv_NCXKD: Tensor) -> Tensor:
    """Keys and values side by side, by list: [C, N * K, 2 * D]."""
    return kv_NCXKD.permute(1, 0, 3, 2, 4).flatten(3, 4).flatten(1, 2)


def _turn(kv_NCXKD: Tensor, positions_NCK: Tensor, frequency: Tensor, sign: int) -> Tensor:
    """The lists with keys turned by their positions (sign 1) or back (-1)."""
    angle = sign * positions_NCK[..., None].double() * frequency
    turned = rotate(kv_NCXKD[:, :, 0], (angle.cos().float(), angle.sin().float()))
    return torch.stack([turned, kv_NCXKD[:, :, 1]], 2)
