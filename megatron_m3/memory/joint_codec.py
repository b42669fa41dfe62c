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
    """Key-value heads of the model; class ``layer * num_heads + head`` of the code is one layer's head."""
    code: TransformCode
    frequency: Tensor
    """float64 [D/2]: angle of each pair of a key by which one position turns it."""
    kind: ClassVar[str] = "joint"

    @classmethod
    def train(cls, code_bytes: int, sample: ExplicitMemories, sensitivity: Sensitivity) -> "JointCodec":
        """For memories like ``sample``, least wrong where ``sensitivity`` says that readers notice it."""
        size, num_heads = sample.kv.shape[-1], sample.kv.shape[3]
        vectors_LGND = _by_class(_turn(sample.kv, sample.positions, sensitivity.frequency, -1))
        valid_N = sample.valid_slots().flatten()
        vectors_CND = vectors_LGND.flatten(0, 1)[:, valid_N]
        weights_CDD = torch.zeros(len(vectors_CND), 2 * size, 2 * size)
        values_CND = vectors_CND[..., size:] - vectors_CND[..., size:].mean(1, keepdim=True)
        value_CDD, query_CDD = sensitivity.value_LGDD.flatten(0, 1), sensitivity.query_LGDD.flatten(0, 1)
        spread_C = torch.einsum("cnd,cde,cne->c", values_CND, value_CDD, values_CND) / values_CND.shape[1]
        weights_CDD[:, :size, :size] = query_CDD * spread_C[:, None, None]
        weights_CDD[:, size:, size:] = value_CDD
        code = TransformCode.train(vectors_CND, weights_CDD, code_bytes)
        return cls(name=f"KLT{code_bytes}", head_size=size, num_heads=num_heads, code=code,
                   frequency=sensitivity.frequency)

    @property
    def token_bytes(self) -> int:
        """See :class:`Codec`."""
        return self.code.code_bytes

    def encode_lists(self, memories: ExplicitMemories) -> np.ndarray:
        """See :class:`Codec`."""
        N, L, _, G, K, _ = memories.kv.shape
        vectors_LGND = _by_class(_turn(memories.kv, memories.positions, self.frequency, -1))
        codes_CNB = self.code.encode(vectors_LGND.flatten(0, 1))
        return np.ascontiguousarray(codes_CNB.reshape(L, G, N, K * self.token_bytes).transpose(2, 0, 1, 3))

    def decode_lists(self, codes_NLGB: np.ndarray, positions_NLGK: Tensor, heads: slice) -> Tensor:
        """See :class:`Codec`."""
        N, L, G, K = positions_NLGK.shape
        classes = torch.arange(L * self.num_heads).view(L, self.num_heads)[:, heads].flatten()
        codes_CNB = codes_NLGB.transpose(1, 2, 0, 3).reshape(L * G, N * K, self.token_bytes)
        kv_LGNKXD = self.code.decode(codes_CNB, classes).view(L, G, N, K, 2, self.head_size)
        return _turn(kv_LGNKXD.permute(2, 0, 4, 1, 3, 5), positions_NLGK, self.frequency, 1)

    def empty_lists(self, codes_NLGB: np.ndarray, valid_NK: np.ndarray) -> np.ndarray:
        """See :class:`Codec`."""
        codes = codes_NLGB.reshape(*codes_NLGB.shape[:3], valid_NK.shape[1], self.token_bytes)
        return (codes * valid_NK[:, None, None, :, None]).reshape(codes_NLGB.shape)

    def files(self) -> dict[str, bytes]:
        """See :class:`Codec`."""
        return {"keys_and_values.safetensors": save(self.code.tensors() | {"frequency": self.frequency})}

    def settings(self) -> dict[str, object]:
        """See :class:`Codec`."""
        return {"num_heads": self.num_heads}

    @classmethod
    def from_files(cls, settings: dict[str, object], files: dict[str, bytes]) -> "JointCodec":
        """The codec that was saved."""
        try:
            tensors = load(files["keys_and_values.safetensors"])
            frequency = tensors.pop("frequency")
            code = TransformCode(**tensors)
        except (KeyError, TypeError, ValueError):
            raise ArtifactError("not a transform code; build the bank again") from None
        return cls(name=str(settings["name"]), head_size=int(str(settings["head_size"])),
                   num_heads=int(str(settings["num_heads"])), code=code, frequency=frequency)


def _by_class(kv_NLXGKD: Tensor) -> Tensor:
    """Keys and values side by side, by layer and head: [L, G, N * K, 2 * D]."""
    return kv_NLXGKD.permute(1, 3, 0, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _turn(kv_NLXGKD: Tensor, positions_NLGK: Tensor, frequency: Tensor, sign: int) -> Tensor:
    """The memories with keys turned by their positions (sign 1) or back (-1)."""
    angle = sign * positions_NLGK[..., None].double() * frequency
    turned = rotate(kv_NLXGKD[:, :, 0], (angle.cos().float(), angle.sin().float()))
    return torch.stack([turned, kv_NLXGKD[:, :, 1]], 2)
