"""Models on disk, read rows at a time: a Hugging Face folder, a GGUF file, or one of our checkpoints.

All three look alike: tensors under their Hugging Face names. Rows are read from the file into memory of their own, so
that what is resident never grows with the model.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_convert.families import read_config
from ckpt_convert.mapping import their_shapes
from megatron_m3.config import ModelConfig
from megatron_m3.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    import torch

BAND_BYTES = 16 << 20
"""Bytes of rows that are read at a time."""
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
IGNORED = (".rotary_emb.inv_freq", ".attention.masked_bias")
"""Ends of the names of buffers that old checkpoints hold beside the weights."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Rows of a tensor as they lie in a file, one behind the other."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: "torch.dtype"
    """Type of what is read."""
    row_bytes: int
    quantization: Any = None
    """GGUF's type of a tensor that is decoded to fp32."""
    interleaved_heads: int = 0
    """Heads whose rows llama.cpp has reordered."""

    def rows(self, first: int, last: int) -> "torch.Tensor":
        """Rows ``first`` up to ``last``, in memory of their own."""
        if not self.interleaved_heads:
            return self._read(first, last)
        head = self.shape[0] // self.interleaved_heads
        begin, end = first // head * head, -(-last // head) * head
        found = self._read(begin, end)
        # llama.cpp pairs neighbouring rows for its rotation, we pair those half a head apart
        found = found.view(-1, head // 2, 2, *found.shape[1:]).transpose(1, 2).reshape(found.shape)
        return found[first - begin : last - begin]

    def _read(self, first: int, last: int) -> "torch.Tensor":
        import torch

        data = bytearray((last - first) * self.row_bytes)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.offset + first * self.row_bytes)
            done = 0
            while done < len(data):
                count = stream.readinto(memoryview(data)[done:])
                if not count:
                    raise ArtifactError(f"{self.path}: cut short; get the file again")
                done += count
        shape = (last - first, *self.shape[1:])
        if self.quantization is None:
            return torch.frombuffer(data, dtype=self.dtype).view(shape)
        import numpy as np
        from gguf.quants import dequantize

        raw = np.frombuffer(data, np.uint8).reshape(last - first, self.row_bytes)
        return torch.from_numpy(np.ascontiguousarray(dequantize(raw, self.quantization), np.float32)).view(shape)


class Source(ABC):
    """A model whose tensors can be read by their Hugging Face names."""

    path: Path
    family: str
    model: ModelConfig
    dtype: "torch.dtype"
    """Narrowest type, fp32 or bf16, that holds every number exactly."""

    @abstractmethod
    def rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        """Rows ``first`` up to ``last`` of a tensor, in their stored type or a wider one."""

    def bands(self, name: str) -> Iterator[tuple[int, int, "torch.Tensor"]]:
        """A tensor in slices of at most :data:`BAND_BYTES`: first row, one past the last, and the rows."""
        shape = their_shapes(self.model)[name]
        step = max(1, BAND_BYTES // (4 * (shape[1] if len(shape) > 1 else 1)))
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            yield first, last, self.rows(name, first, last)


@dataclass(kw_only=True)
class FileSource(Source):
    """A Hugging Face folder or a GGUF file."""

    path: Path
    family: str
    model: ModelConfig
    dtype: "torch.dtype" = field(init=False)
    tensors: dict[str, StoredTensor]

    def __post_init__(self) -> None:
        import torch

        self._check()
        half = all(tensor.dtype == torch.bfloat16 for tensor in self.tensors.values())
        self.dtype = torch.bfloat16 if half else torch.float32

    def _check(self) -> None:
        """Compare names and shapes with those of the family."""
        expected = their_shapes(self.model)
        output = self.tensors.pop("lm_head.weight", None) if self.model.tie_embeddings else None
        for name, shape in expected.items():
            if name not in self.tensors:
                raise ArtifactError(f"{self.path}: tensor {name} is missing; take a complete model")
            if self.tensors[name].shape != shape:
                raise ArtifactError(f"{self.path}: tensor {name} has shape {self.tensors[name].shape}, "
                                    f"the config says {shape}; take a model whose files belong together")
        for name in self.tensors:
            if name not in expected:
                raise UnsupportedError(f"{self.path}: tensor {name} is none of a {self.family} model's; "
                                       "it would be lost")
        if output is not None:
            self._check_tied(output)

    def _check_tied(self, output: StoredTensor) -> None:
        """Refuse a tied model's output projection if it is not the embedding."""
        name = "model.embed_tokens.weight"
        if output.shape != self.tensors[name].shape or not all(
            output.rows(first, last).equal(rows) for first, last, rows in self.bands(name)
        ):
            raise ArtifactError(f"{self.path}: lm_head.weight differs from the embedding, but the config has "
                                "tie_word_embeddings=true; set it to false if both are meant")

    def rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        """See :class:`Source`."""
        return self.tensors[name].rows(first, last)


class Swapped(Source):
    """A model as a wrong mapping would read it: gate and up projections exchanged."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path, self.family, self.model, self.dtype = source.path, source.family, source.model, source.dtype

    def rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        """See :class:`Source`."""
        gate, up = ".mlp.gate_proj.", ".mlp.up_proj."
        wrong = name.replace(gate, up) if gate in name else name.replace(up, gate)
        return self.source.rows(wrong, first, last)


def open_model(path: Path) -> Source:
    """Open a Hugging Face folder, a GGUF file, one of our checkpoints or the folder of a run; only headers are read.

    Raises:
        UnsupportedError: a feature that our model does not have, by name.
        ArtifactError: nothing of the kind there, or files that do not belong together.
    """
    path = Path(path)
    if path.is_file() and path.open("rb").read(4) == b"GGUF":
        from ckpt_convert.gguf_source import open_gguf

        return open_gguf(path)
    if is_checkpoint(path):
        from ckpt_convert.checkpoint_source import CheckpointSource

        return CheckpointSource(path, checksums=False)
    if (path / "config.json").is_file():
        return open_folder(path)
    raise ArtifactError(f"{path}: neither a Hugging Face folder, nor a GGUF file, nor a checkpoint; name one of them")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of our checkpoints, or that of a run (which has a ``config.json`` of its own)."""
    from megatron_m3.model.checkpoint import FOLDER, list_checkpoints

    return bool(FOLDER.fullmatch(path.name) and (path / "manifest.json").is_file()) or bool(list_checkpoints(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        ArtifactError: not there, or not an object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: missing, or not a JSON object; take a complete model")
    return found


def open_folder(folder: Path) -> FileSource:
    """A folder with config.json and safetensors, in one file or several."""
    family, model = read_config(read_json(folder / "config.json"), folder / "config.json")
    if (folder / SINGLE).is_file():  # before an index that another saving may have left, as transformers does
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ArtifactError(f"{folder / INDEX}: weight_map is missing; take a complete model")
        files = sorted({str(file) for file in weight_map.values()})
    else:
        raise UnsupportedError(f"{folder}: no {SINGLE} and no {INDEX}; save the model as safetensors")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors |= _safetensors(folder / name)
    return FileSource(path=folder, family=family, model=model, tensors=tensors)


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors file lies."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # checks types, sizes and places of all tensors
            pass
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: missing, cut short or not a safetensors file ({error}); get the file again"
                            ) from None
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if name.endswith(IGNORED):
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UnsupportedError(f"{path}: tensor {name} is of type {entry['dtype']}; known are fp32, bf16 and fp16")
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found[name] = StoredTensor(
            path=path, offset=8 + length + first, shape=shape, row_bytes=(last - first) // (shape[0] if shape else 1),
            dtype=getattr(torch, SAFETENSORS_DTYPES[entry["dtype"]]),
        )
    return found
