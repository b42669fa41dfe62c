"""The codec KLTn: the keys and values of kept tokens in n bytes each, by a transform of each memory layer and head.

Keys are turned back by their positions, which the record holds, so that a head's keys differ by their words alone; what
all tokens of a head have in common costs nothing; and bits go where a reader would notice an error most. The lists of a
head, one of each layer, share their bytes: slot k of all of them is one code of n bytes a list.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from megatron_m3.errors import ArtifactError
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.record import by_head
from megatron_m3.memory.sensitivity import Sensitivity
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.ops.codec.transform import TransformCode
from megatron_m3.ops.rope import rotate, turns

if TYPE_CHECKING:
    from megatron_m3.ops.codec.triton_decode import SlotDecoder

MOST_POSITIONS = 1 << 15
"""Places of tokens that a record can hold."""


@dataclass(frozen=True, kw_only=True)
class JointCodec(Codec):
    """A transform code whose classes are the lists and whose groups are the heads.

    The bytes of a head's lists are those of its first kept tokens in all layers, then of the second, and so on.
    """

    num_heads: int
    """Key-value heads of the model."""
    code: TransformCode
    """Its classes are the lists, by layer and head."""
    frequency: Tensor
    """float64 [D/2]: angle of each pair of a key by which one position turns it."""
    _decoders: "dict[tuple[int, int], SlotDecoder]" = field(default_factory=dict, init=False, repr=False, compare=False)
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
        code = TransformCode.train(vectors_CND, weights_CDD, held_LG.nonzero()[:, 1], code_bytes)
        return cls(name=f"KLT{code_bytes}", head_size=size, held_LG=held_LG, num_heads=held_LG.shape[1], code=code,
                   frequency=sensitivity.frequency)

    def to(self, device: torch.device | str) -> Self:
        """See :class:`Codec`."""
        device = torch.device(device)
        return replace(self, device=device, code=self.code.to(device))

    @property
    def token_bytes(self) -> int:
        """See :class:`Codec`."""
        return int(self.code.bits_CD.int().sum()) // (8 * len(self.code.group_C))

    def encode_lists(self, kv_NCXKD: Tensor, positions_NCK: Tensor) -> np.ndarray:
        """See :class:`Codec`."""
        N, C, K = positions_NCK.shape
        vectors_CND = _by_class(_turn(kv_NCXKD, positions_NCK, self.frequency, -1))
        codes_NCB = np.empty((N, C, K * self.token_bytes), np.uint8)
        for head in self.code.group_C.unique().tolist():
            lists_C = (self.code.group_C == head).numpy()
            codes_NB = self.code.encode(head, vectors_CND[lists_C]).cpu().numpy()
            codes_NCB[:, lists_C] = codes_NB.reshape(N, lists_C.sum(), codes_NCB.shape[2])
        return codes_NCB

    def decode(
        self, codes_NCB: np.ndarray, positions_NLGK: Tensor, num_kept_N: Tensor, heads: slice = slice(None),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """See :class:`Codec`; on a CUDA device by one kernel."""
        how = self.decode_at_once if self.device.type == "cuda" else super().decode
        return how(codes_NCB, positions_NLGK, num_kept_N, heads, dtype)

    def decode_at_once(
        self, codes_NCB: np.ndarray, positions_NLGK: Tensor, num_kept_N: Tensor, heads: slice, dtype: torch.dtype
    ) -> Tensor:
        """:meth:`decode` by a kernel that writes nothing but the result.

        Raises:
            UnsupportedError: neither a CUDA device with Triton nor Triton's interpreter, or too large a head size.
        """
        held_LG = self._held(positions_NLGK, heads)
        order_C = by_head(held_LG)
        positions_NCK = positions_NLGK[:, held_LG][:, order_C].to(self.device)
        codes_NB = torch.from_numpy(codes_NCB[:, order_C]).flatten(1).to(self.device)
        (N, L, G, K), make = positions_NLGK.shape, torch.empty if held_LG.all() else torch.zeros
        kv_NLXGKD = make(N, L, 2, G, K, self.head_size, dtype=dtype, device=self.device)
        row_N = torch.arange(N, device=self.device)
        self._decoder(heads).decode(
            codes_NB, positions_NCK, num_kept_N.to(self.device),
            torch.stack([row_N, row_N, torch.zeros_like(row_N)], 1), kv_NLXGKD.permute(1, 2, 0, 3, 4, 5))
        return kv_NLXGKD

    def _decoder(self, heads: slice) -> "SlotDecoder":
        """The kernel with the tables of some heads."""
        from megatron_m3.ops.codec.triton_decode import SlotDecoder

        first, last, _ = heads.indices(self.num_heads)
        if (first, last) not in self._decoders:
            every_LG = torch.ones(len(self.code.group_C) // self.num_heads, self.num_heads, dtype=torch.bool)
            self._decoders[first, last] = SlotDecoder(
                self.code, self.frequency, every_LG if self.held_LG is None else self.held_LG, heads, MOST_POSITIONS,
                self.device)
        return self._decoders[first, last]

    def decode_lists(
        self, codes_NCB: np.ndarray, positions_NCK: Tensor, heads: slice, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """See :class:`Codec`."""
        N, C, K = positions_NCK.shape
        head_C = self.code.group_C[torch.isin(self.code.group_C, torch.arange(self.num_heads)[heads])]
        kv_CNKXD = torch.empty(C, N, K, 2, self.head_size, device=self.device)
        for head in head_C.unique().tolist():
            lists_C = (head_C == head).numpy()
            codes_NB = np.ascontiguousarray(codes_NCB[:, lists_C]).reshape(N * K, lists_C.sum() * self.token_bytes)
            decoded_CND = self.code.decode(head, torch.from_numpy(codes_NB).to(self.device))
            kv_CNKXD[lists_C] = decoded_CND.reshape(lists_C.sum(), N, K, 2, self.head_size)
        return _turn(kv_CNKXD.permute(1, 0, 3, 2, 4), positions_NCK, self.frequency, 1, dtype)

    def empty_lists(self, codes_NCB: np.ndarray, valid_NK: np.ndarray) -> np.ndarray:
        """See :class:`Codec`."""
        emptied = codes_NCB.copy()
        for head in self.code.group_C.unique().tolist():
            lists_C = (self.code.group_C == head).numpy()
            codes_NKB = codes_NCB[:, lists_C].reshape(*valid_NK.shape, lists_C.sum() * self.token_bytes)
            emptied[:, lists_C] = (codes_NKB * valid_NK[..., None]).reshape(emptied[:, lists_C].shape)
        return emptied

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


def _turn(
    kv_NCXKD: Tensor, positions_NCK: Tensor, frequency: Tensor, sign: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The lists with keys turned by their positions (sign 1) or back (-1), in ``dtype``."""
    count = int(positions_NCK.max()) + 1 if positions_NCK.numel() else 0
    angle, places = sign * torch.arange(count)[:, None].double() * frequency, positions_NCK.to(kv_NCXKD.device).long()
    cosine, sine = (part.to(kv_NCXKD.device)[places] for part in turns(angle, torch.float32))
    turned = torch.empty(kv_NCXKD.shape, dtype=dtype, device=kv_NCXKD.device)
    turned[:, :, 0] = rotate(kv_NCXKD[:, :, 0], (cosine, sine))
    turned[:, :, 1] = kv_NCXKD[:, :, 1]
    return turned
