"""A GGUF file as a source: where its tensors lie, in llama.cpp's types, names and order of rows."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_convert.families import FAMILIES, read_config
from ckpt_convert.gguf_config import gguf_fields, llama3_scaling
from ckpt_convert.mapping import gguf_names
from ckpt_convert.sources import FileSource, StoredTensor
from megatron_m3.config import ModelConfig
from megatron_m3.errors import ArtifactError, UnsupportedError

if TYPE_CHECKING:
    from gguf import GGUFReader


def open_gguf(path: Path) -> FileSource:
    """A GGUF file; quantised tensors are read as fp32."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = gguf_fields(reader, path)
    except (ValueError, OSError, IndexError) as error:
        raise ArtifactError(f"{path}: not a readable GGUF file ({error}); get the file again") from None
    if reader.byte_order == "S":
        raise UnsupportedError(f"{path}: made for machines of the other byte order; take a file made for this one")
    family, model = read_config(fields, path)
    stored = _gguf_tensors(path, reader)
    scaling = stored.pop("rope_freqs.weight", None)
    if scaling is not None:
        fields["rope_scaling"] = llama3_scaling(scaling.rows(0, scaling.shape[0]), model, path)
        family, model = read_config(fields, path)
    names = gguf_names(model)
    return FileSource(path=path, family=family, model=model,
                      tensors={names.get(name, name): _as_ours(tensor, name, family, model)
                               for name, tensor in stored.items()})


def _as_ours(tensor: StoredTensor, name: str, family: str, model: ModelConfig) -> StoredTensor:
    """A tensor of a GGUF file, with the order of its rows."""
    heads = {"attn_q": model.num_heads, "attn_k": model.num_kv_heads}
    kind = name.split(".")[-2]
    if not FAMILIES[family].gguf_interleaved or kind not in heads:
        return tensor
    return replace(tensor, interleaved_heads=heads[kind])


def _gguf_tensors(path: Path, reader: "GGUFReader") -> dict[str, StoredTensor]:
    """Where each tensor of a GGUF file lies, by its GGUF name."""
    import torch
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize

    plain = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    found = {}
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape))
        if int(tensor.data_offset) + int(tensor.n_bytes) > path.stat().st_size:
            raise ArtifactError(f"{path}: cut short before the end of {tensor.name}; get the file again")
        row_bytes = int(tensor.n_bytes) // shape[0]
        if kind not in plain:
            try:
                dequantize(tensor.data[:1], kind)
            except NotImplementedError:
                raise UnsupportedError(f"{path}: tensor {tensor.name} is of type {kind.name}, which cannot be decoded"
                                       ) from None
        found[tensor.name] = StoredTensor(
            path=path, offset=int(tensor.data_offset), shape=shape, row_bytes=row_bytes,
            dtype=plain.get(kind, torch.float32), quantization=None if kind in plain else kind,
        )
    return found
