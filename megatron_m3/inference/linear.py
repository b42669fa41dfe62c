"""Products with weights that do not change any more."""

from collections.abc import Callable

import torch
from torch import Tensor

PACKED_FOR_ROWS = 8
"""Rows for which the CPU's library lays a weight out; the layout serves any number, from one to thousands, as well."""


def frozen_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The function ``rows [N, I] -> rows @ weight.T + bias [N, O]`` of a weight that stays as it is.

    On the CPU it holds a copy of the weight in oneDNN's own layout: few rows then take about half the time, as the
    weight is read once and in order. Where oneDNN does not serve, the weight is used as it lies.
    """
    weight_OI, bias_O = weight_OI.detach(), None if bias_O is None else bias_O.detach()
    if not _packs(weight_OI):
        return lambda rows_NI: torch.nn.functional.linear(rows_NI, weight_OI, bias_O)
    library = torch.ops.mkldnn
    packed = library._reorder_linear_weight(weight_OI.contiguous(), PACKED_FOR_ROWS)
    product = library._linear_pointwise.default
    return lambda rows_NI: product(rows_NI, packed, bias_O, "none", [], "")


def _packs(weight_OI: Tensor) -> bool:
    """Whether oneDNN has a layout and a product for such a weight here."""
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight_OI.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_OI.dtype == torch.float32
