"""Codecs by name: which there are, what they take, their training, and reading them from disk."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import check_files, read_manifest
from megatron_m3.memory.codec import KIND, SCHEMA, Codec, Dtype, SeparateCodec, check_finite
from megatron_m3.memory.joint_codec import JointCodec
from megatron_m3.memory.sensitivity import Sensitivity
from megatron_m3.memory.types import ExplicitMemories
from megatron_m3.ops.codec import FaissVectors, Fp8Vectors, codebook_bytes, vectors_needed
from megatron_m3.ops.codec.reference import make_index
from megatron_m3.ops.codec.trellis import MAX_BITS, STATES

JOINT = re.compile(r"KLT([1-9]\d*)")
VECTORS_PER_NUMBER = 2
"""Fewest kept tokens to train KLT on, for each number of a key and value."""
AUTO_PER_NUMBER = 8
"""The same where KLT is chosen by itself: what leaves it no worse on other references than on its own."""


def load_codec(folder: Path, held_LG: Tensor | None = None) -> tuple[Codec, str]:
    """A saved codec and its hash; ``held_LG`` are the lists that it was trained for, None for all.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    manifest = read_manifest(folder, KIND, SCHEMA)
    check_files(folder, manifest, checksums=True, mend="remove the bank and build it again")
    files = {name: (folder / name).read_bytes() for name in manifest.files}
    kinds: dict[str, type[SeparateCodec] | type[JointCodec]] = {"separate": SeparateCodec, "joint": JointCodec}
    try:
        return kinds[manifest.settings["kind"]].from_files(manifest.settings, files, held_LG), manifest.hash
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None


def check_codec(name: str, head_size: int) -> None:
    """Check that there is a codec ``name`` for heads of ``head_size`` numbers.

    Raises:
        ConfigError: there is none.
    """
    if name not in ("auto", "none"):
        token_bytes(name, head_size)


def token_bytes(name: str, head_size: int, dtype: Dtype = "bf16") -> int:
    """Bytes of the key and the value of one kept token with the codec ``name``, other than auto; none is ``dtype``.

    Raises:
        ConfigError: there is no such codec.
    """
    if name == "none":
        return 2 * head_size * (4 if dtype == "fp32" else 2)
    if name == "fp8":
        return 2 * head_size
    joint = JOINT.fullmatch(name)
    if joint is None:
        return 2 * int(make_index(name, head_size).sa_code_size())
    if int(joint[1]) > 2 * head_size:
        raise ConfigError(f"codec={name}: takes at most {2 * head_size} bytes for head size {head_size}")
    return int(joint[1])


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """How much there is to train a codec on."""

    references: int
    kept_tokens: int
    """Of all references together, in one head of one layer."""
    num_lists: int
    """Heads that hold memory, those of all memory layers."""


def resolve_codec(name: str, head_size: int, sample: SampleSize) -> str:
    """The codec that ``name`` stands for: auto is what the sample allows, others are themselves.

    Raises:
        ConfigError: the sample is too small for it, or there is none of that name.
    """
    if name == "none":
        return name
    vectors = sample.kept_tokens * sample.num_lists
    if name == "auto":
        name = choose_codec(head_size, sample.kept_tokens)
    token_bytes(name, head_size)
    if JOINT.fullmatch(name):
        needed, count, what = VECTORS_PER_NUMBER * 2 * head_size, sample.kept_tokens, "kept tokens"
    else:
        needed, count, what = 1 if name == "fp8" else vectors_needed(name), vectors, "keys"
    if count < needed:
        raise ConfigError(
            f"codec={name}: needs {needed:,} {what} to train on, the sample of {sample.references:,} references "
            f"has {count:,}; give a larger codec_sample, more references, or codec=auto"
        )
    return name


def codec_file_bytes(name: str, head_size: int, num_lists: int, *, shared: bool = False) -> int:
    """About the bytes of a trained codec on disk."""
    if name in ("none", "fp8"):
        return 0
    if JOINT.fullmatch(name):
        return 4 * (num_lists * (2 * (2 * head_size) ** 2 + 2 * 2 * head_size) + (MAX_BITS + 1) * STATES)
    return (1 if shared else 2) * codebook_bytes(name, head_size)


def train_codec(
    name: str, sample: ExplicitMemories, *, held_LG: Tensor | None = None, dtype: Dtype = "fp32", shared: bool = False,
    sensitivity: Callable[[], Sensitivity] | None = None,
) -> Codec:
    """The codec ``name`` for memories like ``sample``; same sample, same bytes.

    Args:
        name: auto, none, fp8, KLT and the bytes of a key and value, or a FAISS factory string.
        sample: memories of references that were drawn uniformly.
        held_LG: which heads hold memory in which memory layers, bool; the others teach nothing. None: all do.
        dtype: numbers of the codec none.
        shared: one codebook, or scale of fp8, for keys and values together.
        sensitivity: measures what readers notice; KLT asks for it.

    Raises:
        ConfigError: the sample holds fewer vectors than the construction needs, or there is none of that name.
    """
    head_size = sample.kv.shape[-1]
    if name == "none":
        return SeparateCodec.none(head_size, dtype, held_LG)
    if held_LG is None:
        held_LG = torch.ones(sample.positions.shape[1:3], dtype=torch.bool)
    name = resolve_codec(name, head_size, SampleSize(
        references=len(sample), kept_tokens=int(sample.num_kept.sum()), num_lists=int(held_LG.sum())))
    check_finite(sample)
    if JOINT.fullmatch(name):
        assert sensitivity is not None, "KLT needs to know what readers notice"
        return JointCodec.train(token_bytes(name, head_size), sample, sensitivity(), held_LG)
    key, value = sample.vectors(0, held_LG), sample.vectors(1, held_LG)
    train = Fp8Vectors.train if name == "fp8" else functools.partial(FaissVectors.train, name)
    trained = [train(np.concatenate([key, value]))] * 2 if shared else [train(key), train(value)]
    return SeparateCodec(name=name, head_size=head_size, held_LG=held_LG, dtype=dtype, key=trained[0], value=trained[1])


def choose_codec(head_size: int, kept_tokens: int) -> str:
    """The codec that ``auto`` stands for: KLT at the paper's rate, or fp8 where there is too little to train it on.

    KLT takes 14 bytes a vector for heads of 64 to 80 numbers, as the paper's codec does; for smaller heads in
    proportion to 64, for larger ones to 80. At equal bytes it cost least by far wherever ``m3 memory codecs`` compared.
    """
    vector_bytes = 14 * head_size / min(max(head_size, 64), 80)
    return f"KLT{round(2 * vector_bytes)}" if kept_tokens >= AUTO_PER_NUMBER * 2 * head_size else "fp8"
