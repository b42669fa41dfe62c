"""Attention with explicit memory from Transformer Engine: cuDNN's fused attention for the trunk, merged with memories.

Transformer Engine's own attention gives no log-sum-exp, but the functions below it do: ``fused_attn_fwd`` returns
cuDNN's softmax statistics ``[B, H, T, 1]``, the natural log-sum-exp of the scaled scores in fp32, and
``fused_attn_bwd`` takes them together with the output. Its context-parallel attention merges parts of a sequence
through them, forward and backward, just as ``joint_softmax.py`` merges the memories. Key-value heads are not repeated,
and tensors stay in the order that the model has them in, sequence or batch first.

In bf16 and fp16. FP8 is refused: on sm_90 cuDNN has a backward pass in FP8 for heads of 128 alone, and the merged
output would have to be quantised once more. The interface is not public, so one version of it is taken.

Letters as in ``reference.py``; U is keys, of which there may be more than queries.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention.joint_softmax import Trunk, attend_alone, attend_jointly

WHO, INSTEAD = "model.attention=te", "use triton or torch"
VERSION = "2.20"
"""Of Transformer Engine: the release whose functions are called here."""
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Setting:
    """One kind of call, for which cuDNN has a kernel or has none."""

    form: str
    """Order of axes in memory: bshd or sbhd."""
    mask: str
    """causal, or causal_bottom_right where there are more keys than queries."""
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    queries: int
    keys: int
    deterministic: bool

    @property
    def layout(self) -> str:
        """Of queries, keys and values, in Transformer Engine's words."""
        return "_".join([self.form] * 3)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of both passes."""
        return {"qkv_layout": self.layout, "o_format": self.form, "attn_bias_type": "no_bias",
                "attn_mask_type": self.mask, "window_size": (-1, 0),
                "bottom_right_diagonal": self.mask == "causal_bottom_right"}


class Library(NamedTuple):
    """The functions of Transformer Engine that are called."""

    forward: Callable[..., tuple[Tensor, list[Tensor]]]
    """fused_attn_fwd."""
    backward: Callable[..., tuple[Any, ...]]
    """fused_attn_bwd."""
    starts: Callable[[int, int, torch.device], Tensor]
    """First row of each sequence, all of one length, and the end: ``[B + 1]``, int32."""
    find: Callable[[Setting], Any]
    """The kernel for a setting; UnsupportedError in the library's words where there is none."""


def need_release(who: str, instead: str) -> None:
    """Refuse to go on without the release of Transformer Engine that is used here.

    Args:
        who: what a user asked for that needs it, in errors.
        instead: what would do without it.

    Raises:
        UnsupportedError: it is missing, or is another release.
    """
    try:
        found = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError(f"{who}: Transformer Engine is not installed; make gpu-setup installs it, or "
                               f"{instead}") from None
    if not found.startswith(f"{VERSION}."):
        raise UnsupportedError(f"{who}: Transformer Engine {found} is installed, which may differ from {VERSION}; "
                               f"make gpu-setup installs that, or {instead}")


@functools.cache
def library() -> Library:
    """Transformer Engine's functions, imported when they are first needed.

    Raises:
        UnsupportedError: it is missing, cannot be loaded, or is another release.
    """
    where = "transformer_engine.pytorch"
    need_release(WHO, INSTEAD)
    try:
        functions = importlib.import_module(f"{where}.cpp_extensions.fused_attn")
        shapes = importlib.import_module(f"{where}.attention.dot_product_attention.utils")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(f"{WHO}: Transformer Engine cannot be imported ({reason}); {INSTEAD}") from None
    return Library(functions.fused_attn_fwd, functions.fused_attn_bwd, shapes.get_full_cu_seqlens, find_kernel)


def question(setting: Setting) -> Any:
    """Transformer Engine's description of a setting."""
    functions = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    shapes = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    dtype = importlib.import_module("transformer_engine.pytorch.constants").TE_DType[setting.dtype]
    form, layout = functions.QKVFormat[setting.form], functions.QKVLayout[setting.layout]
    left, right = setting.arguments["window_size"]
    return shapes.FusedAttentionParams(
        is_training=True, deterministic=setting.deterministic, attn_mask_type=functions.AttnMaskType[setting.mask],
        window_size_left=left, window_size_right=right,
        bottom_right_diagonal=setting.arguments["bottom_right_diagonal"], attn_scale=setting.head_size**-0.5,
        qkv_dtype=dtype, o_dtype=dtype, do_dtype=dtype, dqkv_dtype=dtype,
        qkv_layout=layout, o_format=form, do_format=form, dqkv_layout=layout, batch_size=setting.batch,
        num_attn_heads=setting.heads, num_gqa_groups=setting.kv_heads, head_dim_qk=setting.head_size,
        head_dim_v=setting.head_size, max_seqlen_q=setting.queries, max_seqlen_kv=setting.keys,
    )


@functools.lru_cache(maxsize=256)
def find_kernel(setting: Setting) -> Any:
    """The kernel that Transformer Engine has for a setting on the current device.

    Raises:
        UnsupportedError: none, with its reason.
    """
    functions = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    kernel, reason = functions.tex.get_fused_attn_backend(question(setting))
    if int(kernel) != int(functions.FusedAttnBackend.F16_arbitrary_seqlen):
        raise UnsupportedError(
            f"{WHO}: no fused attention for {setting.heads}/{setting.kv_heads} heads of {setting.head_size}, "
            f"{setting.queries} queries and {setting.keys} keys in {setting.dtype} "
            f"({' '.join(str(reason).split()) or 'no reason given'}); {INSTEAD}"
        )
    return functions.FusedAttnBackend.cast(kernel)


def _arrange(part_BTHD: Tensor, form: str) -> Tensor:
    """The tensor in an order of axes that is its order in memory; copied only where it is not."""
    return (part_BTHD.transpose(0, 1) if form == "sbhd" else part_BTHD).contiguous()


class TeKernel:
    """Transformer Engine's fused attention: the last query sees all keys, each one before it one less."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def _setting(self, query_BTHD: Tensor, key_BUGD: Tensor) -> Setting:
        (B, T, H, D), (U, G) = query_BTHD.shape, key_BUGD.shape[1:3]
        sequence_first = not query_BTHD.is_contiguous() and query_BTHD.transpose(0, 1).is_contiguous()
        return Setting(
            form="sbhd" if sequence_first else "bshd", mask="causal" if T == U else "causal_bottom_right",
            dtype=query_BTHD.dtype, batch=B, heads=H, kv_heads=G, head_size=D, queries=T, keys=U,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    def _sizes(self, setting: Setting, device: torch.device) -> tuple[int, int, Tensor, Tensor]:
        queries, keys = (self.library.starts(setting.batch, length, device)
                         for length in (setting.queries, setting.keys))
        return setting.queries, setting.keys, queries, keys

    def forward(self, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Trunk:
        """See :class:`~megatron_m3.ops.memory_attention.joint_softmax.TrunkKernel`."""
        setting = self._setting(query_BTHD, key_BTGD)
        kernel = self.library.find(setting)
        parts = [_arrange(part, setting.form) for part in (query_BTHD, key_BTGD, value_BTGD)]
        out, (statistics, *state) = self.library.forward(
            True, *self._sizes(setting, query_BTHD.device), *parts, setting.dtype, kernel, **setting.arguments)
        return Trunk(out.transpose(0, 1) if setting.form == "sbhd" else out, statistics[..., 0], (setting, *state))

    def backward(
        self, grad_BTHD: Tensor, query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, trunk: Trunk
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~megatron_m3.ops.memory_attention.joint_softmax.TrunkKernel`."""
        setting, *state = trunk.rest
        parts = (query_BTHD, key_BTGD, value_BTGD, trunk.out_BTHD, grad_BTHD)
        gradients = self.library.backward(
            *self._sizes(setting, query_BTHD.device), *(_arrange(part, setting.form) for part in parts), setting.dtype,
            [trunk.lse_BHT[..., None].contiguous(), *state], self.library.find(setting), do_format=setting.form,
            dqkv_layout=setting.layout, deterministic=setting.deterministic, **setting.arguments)
        d_query, d_key, d_value = (
            part.transpose(0, 1) if setting.form == "sbhd" else part for part in gradients[:3])
        return d_query, d_key, d_value


def _kernel_for(query: Tensor, *others: Tensor) -> TeKernel:
    """Transformer Engine's kernel, or its refusal by name of the device or the dtype."""
    if not query.is_cuda:
        raise UnsupportedError(f"{WHO}: tensors on {query.device.type}; Transformer Engine computes on CUDA devices "
                               "alone: use torch")
    if query.dtype not in DTYPES:
        raise UnsupportedError(f"{WHO}: cuDNN's fused attention is used in bf16 and fp16, not in {query.dtype}; "
                               "set training.dtype=bf16, or use torch")
    if any(tensor.dtype != query.dtype for tensor in others):
        raise UnsupportedError(f"{WHO}: queries, keys and values of different dtypes; use torch")
    return TeKernel(library())


def memory_attention(
    query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, memory_key_BCMGD: Tensor, memory_value_BCMGD: Tensor,
    memory_valid_BCM: Tensor, *, prefix_length: int, chunk_length: int, window: int,
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.memory_attention`; memory grows linearly with length."""
    trunk, memory = (query_BTHD, key_BTGD, value_BTGD), (memory_key_BCMGD, memory_value_BCMGD)
    return attend_jointly(_kernel_for(*trunk, *memory), *trunk, *memory, memory_valid_BCM,
                          prefix_length=prefix_length, chunk_length=chunk_length, window=window)


def causal_attention(query_BTHD: Tensor, key_BTGD: Tensor, value_BTGD: Tensor) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.causal_attention`."""
    return attend_alone(_kernel_for(query_BTHD, key_BTGD, value_BTGD), query_BTHD, key_BTGD, value_BTGD)


def reference_attention(
    query_NTHD: Tensor, key_NTGD: Tensor, value_NTGD: Tensor, prefix_key_NPGD: Tensor, prefix_value_NPGD: Tensor
) -> Tensor:
    """See :func:`megatron_m3.ops.memory_attention.reference.reference_attention`.

    The prefix stands before the keys under cuDNN's bottom-right causal mask, so no prefix row is computed.
    """
    return causal_attention(query_NTHD, torch.cat([prefix_key_NPGD, key_NTGD], 1),
                            torch.cat([prefix_value_NPGD, value_NTGD], 1))
