"""Decoding of a transform code whose classes are lists and whose groups are heads, on a CUDA device, in one kernel.

From the bytes of records to keys, turned to their positions, and values, in the attention dtype, in whatever place has
their layout: the slots of a decoder's cache, or the ``kv`` of explicit memories.

Letters: N records, C classes, P placements, L memory layers, X key or value, B sequences, G key-value heads, K kept
tokens, M slots of a sequence, D head size, F = D / 2, E = 2 * D, T numbers of a class.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.codec.transform import TransformCode
from megatron_m3.ops.codec.trellis import STATE_BITS
from megatron_m3.ops.triton_support import load_kernels, need_device

WHO = "codec KLT"
INSTEAD = "decode on the CPU"
BLOCK = 16
"""Numbers that a program looks up at a time; with more, registers are spilled."""
MOST_HEAD_SIZE = 256


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernel."""
    return load_kernels("megatron_m3.ops.codec.triton_decode_kernel", WHO, INSTEAD)


def launch_options(head_size: int, num_kept_tokens: int) -> dict[str, int]:
    """Arguments that are compiled into the kernel, and how it is launched."""
    half = max(16, 1 << (head_size // 2 - 1).bit_length())
    return {"K": num_kept_tokens, "D": head_size, "HALF": half, "ROWS": 32 if half <= 64 else 16, "BLOCK": BLOCK,
            "STATE_BITS": STATE_BITS, "num_warps": 4 if half <= 32 else 8, "num_stages": 1}


class SlotDecoder:
    """Tables of a code on one device, for some of its heads."""

    def __init__(self, code: TransformCode, frequency: Tensor, held_LG: Tensor, heads: slice, num_positions: int,
                 device: torch.device | str) -> None:
        """Prepare the tables.

        Args:
            code: its classes are the lists, by layer and head; its groups are the heads.
            frequency: float64 [F], angle of each pair of a key by which one position turns it.
            held_LG: which heads hold memory in which memory layers, bool.
            heads: those of this process; the records have no others.
            num_positions: kept tokens stand before this position of their reference.
            device: where codes are and slots will be.

        Raises:
            UnsupportedError: neither a CUDA device with Triton nor Triton's interpreter, or too large a head size.
        """
        kernels()
        self.head_size = code.mean_CD.shape[1] // 2
        if self.head_size > MOST_HEAD_SIZE or self.head_size % 2:
            raise UnsupportedError(f"model.head_size={self.head_size}: the decoder of KLT takes even sizes up to "
                                   f"{MOST_HEAD_SIZE}; {INSTEAD}")
        first, last, _ = heads.indices(held_LG.shape[1])
        layer_C, head_C = held_LG.cpu().nonzero().unbind(1)
        assert torch.equal(head_C, code.group_C.cpu()), "a code of other lists"
        order_C = head_C.argsort(stable=True)
        chosen_C = order_C[(head_C[order_C] >= first) & (head_C[order_C] < last)]
        head_C = head_C[chosen_C]
        fields_CE, first_byte_C, code_bytes_C = _streams(code.bits_CD.cpu().long()[chosen_C], head_C)
        coded = [row > 0 for row in fields_CE]
        about = [layer_C[chosen_C], head_C - first, first_byte_C, code_bytes_C, fields_CE.count_nonzero(1)]
        self.classes = torch.stack(about, 1).int().to(device)
        self.fields = _blocks([row[some] for row, some in zip(fields_CE, coded, strict=True)]).int().to(device)
        self.matrices = _blocks(
            [rows[some] for rows, some in zip(code.from_CDD.cpu()[chosen_C], coded, strict=True)]).to(device)
        self.means, self.tables = code.mean_CD.cpu()[chosen_C].to(device), code.tables.to(device)
        angle_PF = torch.arange(num_positions)[:, None].double() * frequency.cpu()
        self.cosines, self.sines = angle_PF.cos().float().to(device), angle_PF.sin().float().to(device)

    def decode(
        self, codes_NB: Tensor, positions_NCK: Tensor, num_kept_N: Tensor, placements_P3: Tensor, out_LXBGMD: Tensor
    ) -> None:
        """Write the keys and values of some records; slots of tokens that were not kept get 0, others stay.

        The same inputs give the same bits, wherever they are written.

        Args:
            codes_NB: uint8, the codes of the heads' lists as records have them, by head and layer.
            positions_NCK: int16, of their kept tokens.
            num_kept_N: int32.
            placements_P3: int32; which record, the sequence that reads it, and the slot of its first token.
            out_LXBGMD: where to, of any floating dtype and any strides, the last one 1.
        """
        (N, C, K), P = positions_NCK.shape, len(placements_P3)
        assert (len(codes_NB), C) == (N, len(self.classes)), "records of other lists"
        assert (codes_NB.dtype, positions_NCK.dtype) == (torch.uint8, torch.int16), "no records"
        assert all(tensor.stride(-1) == 1 for tensor in (codes_NB, positions_NCK, out_LXBGMD)), "columns apart"
        assert (out_LXBGMD.shape[1], out_LXBGMD.shape[5]) == (2, self.head_size), "slots of another shape"
        need_device(out_LXBGMD, WHO, INSTEAD)
        if not (P and C):
            return
        options = launch_options(self.head_size, K)
        with torch.cuda.device_of(out_LXBGMD):
            kernels().decode_kernel[-(-P * K // options["ROWS"]), C](
                codes_NB, positions_NCK, num_kept_N.int(), placements_P3.int().contiguous(), out_LXBGMD, self.classes,
                self.fields, self.matrices, self.means, self.tables, self.cosines, self.sines,
                codes_NB.stride(0), positions_NCK.stride()[:2], out_LXBGMD.stride()[:5],
                P * K, self.fields.shape[1], len(self.cosines), **options)


def _streams(bits_CE: Tensor, head_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the numbers of classes, by head, are in codes.

    Returns:
        fields [C, E], bits of a code up to and with a number's, times 16, and its own; 0 where it has none; bytes of a
        token before a class's head [C]; and of that head [C].
    """
    fields_CE = torch.zeros_like(bits_CE)
    for head in head_C.unique():
        bits_T, order_T = bits_CE[head_C == head].flatten().sort(descending=True, stable=True)
        fields_T = torch.zeros_like(bits_T)
        fields_T[order_T] = (bits_T.cumsum(0) * 16 + bits_T) * (bits_T > 0)
        fields_CE[head_C == head] = fields_T.view(-1, bits_CE.shape[1])
    bytes_C = bits_CE.sum(1)
    before_CC, same_CC = head_C < head_C[:, None], head_C == head_C[:, None]
    return fields_CE, (before_CC * bytes_C).sum(1) // 8, (same_CC * bytes_C).sum(1) // 8


def _blocks(rows: list[Tensor]) -> Tensor:
    """The rows of all classes [C, T, ...], filled up with 0 to whole blocks."""
    padded = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)
    extra = padded.new_zeros(len(padded), -padded.shape[1] % BLOCK, *padded.shape[2:])
    return torch.cat([padded, extra], 1)
