"""Checkpoints written piece by piece, without building the model.

The files are those that megatron-core's dist_checkpointing writes, so they load at any layout.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_convert.finite import is_finite
from ckpt_convert.mapping import OurTensor, extra_states
from megatron_m3.config import Config, to_dict
from megatron_m3.errors import ArtifactError, M3Error
from megatron_m3.manifest import Manifest, atomic_folder, hash_file, write_manifest
from megatron_m3.model.checkpoint import KIND, SCHEMA, checkpoint_folder
from megatron_m3.model.weights_hash import WeightSums

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer

COMMON_STATE = "common_state/shard_0_1"
BACKEND = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIECE_BYTES = 64 << 20
"""Larger tensors are stored in several pieces."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A block of one of our tensors, stored in one file."""

    tensor: OurTensor
    start: tuple[int, ...]
    """Its place in the tensor, without the axis of layers."""
    size: tuple[int, ...]
    file: str
    """Name of the file."""

    @property
    def offset(self) -> torch.Size:
        """Its place in the checkpoint's tensor."""
        return torch.Size(self.tensor.offset(*self.start))

    @property
    def sizes(self) -> torch.Size:
        """Its shape in the checkpoint's tensor."""
        return torch.Size((*[1] * (self.tensor.layer is not None), *self.size))


def cut(tensor: OurTensor, start: Sequence[int], size: Sequence[int], file: str) -> Iterator[Piece]:
    """A block of a tensor as pieces of at most :data:`PIECE_BYTES`."""
    step = max(1, PIECE_BYTES // (4 * (size[1] if len(size) > 1 else 1)))
    for first in range(0, size[0], step):
        yield Piece(tensor=tensor, start=(start[0] + first, *start[1:]),
                    size=(min(step, size[0] - first), *size[1:]), file=file)


class Written(NamedTuple):
    """A checkpoint that was written."""

    folder: Path
    weights_hash: str
    broken: list[str]
    """Their tensors that brought NaN or infinite numbers; a name may come several times."""


class _Writer(FileSystemWriter):
    """torch's writer of the metadata, without its random name for each saving: same numbers, same bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_checkpoint(output: Path, config: Config, pieces: Sequence[Piece], make: Callable[[Piece], torch.Tensor],
                     save_tokenizer: Callable[[Path], "Tokenizer"], *, inputs: dict[str, str], info: dict[str, Any],
                     step: int = 0, good: bool = True) -> Written:
    """Write a checkpoint of weights alone, holding one piece at a time; whole or absent.

    Args:
        output: folder of the run; it may not hold checkpoints.
        config: settings that the checkpoint records; ``training.dtype`` is the type of the pieces.
        pieces: all blocks of all tensors, those of a file together.
        make: gives a piece's numbers.
        save_tokenizer: writes the tokenizer's folder.
        inputs: hashes for the manifest.
        info: notes for the manifest.
        step: steps that the weights were trained for.
        good: whether training was healthy then.

    Raises:
        ArtifactError: ``output`` is taken.
        M3Error: the disk is too small, or refuses.
    """
    refuse_output(output)
    folder = checkpoint_folder(output, step)
    dtype = DTYPES[config.training.dtype]
    with atomic_folder(folder) as temporary:
        check_space(temporary, sum(piece.sizes.numel() for piece in pieces) * dtype.itemsize)
        tokenizer = save_tokenizer(temporary / "tokenizer")
        try:
            fingerprint, broken = _write_pieces(temporary, config.model.num_layers, dtype, pieces, make)
        except RuntimeError as error:  # how torch's zip writer speaks of a full disk
            raise M3Error(f"{folder}: cannot write ({str(error).splitlines()[0]}); free space, or choose another "
                          "folder") from error
        (temporary / "metadata.json").write_text(BACKEND)
        names = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
        settings = {"config": to_dict(config), "weights_hash": fingerprint, "step": step, "good": good, "training": {}}
        write_manifest(temporary, Manifest(
            kind=KIND, schema=SCHEMA, settings=settings, info=info, inputs=inputs | {"tokenizer": tokenizer.hash},
            files={name: hash_file(temporary / name) for name in names},
        ))
    return Written(folder, fingerprint, broken)


def refuse_output(output: Path) -> None:
    """Refuse an output that holds something already, by name.

    Raises:
        ArtifactError: it exists, and is more than what an interrupted conversion left.
    """
    if output.is_file() or (output.is_dir() and any(not path.name.endswith(".tmp") for path in output.iterdir())):
        raise ArtifactError(f"{output}: exists already; remove it or choose another folder")


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    stat = os.statvfs(folder)
    if needed > stat.f_bavail * stat.f_frsize:
        raise M3Error(f"{folder.parent}: {needed:,} bytes needed, {stat.f_bavail * stat.f_frsize:,} free; "
                      "free space, or choose another folder")


def _write_pieces(folder: Path, num_layers: int, dtype: torch.dtype, pieces: Sequence[Piece],
                  make: Callable[[Piece], torch.Tensor]) -> tuple[str, list[str]]:
    """Write all pieces and their metadata; the fingerprint of the weights, and :attr:`Written.broken`."""
    sums, results, writer, broken = WeightSums(), [], _Writer(folder), list[str]()
    for number, (file, group) in enumerate(groupby(pieces, key=lambda piece: piece.file)):
        with (folder / file).open("wb") as stream:
            if number == 0:
                results += _write_empty_states(writer, stream, file, num_layers)
            for piece in group:
                data = make(piece).view(piece.sizes)
                broken += broken_parts(piece, data)
                assert data.dtype == dtype, (piece.tensor.key, data.dtype)
                sums.add(piece.tensor.key, data, piece.offset, piece.tensor.global_shape)
                results.append(_write(writer, stream, file, _tensor_item(piece, dtype), data))
    described: dict[str, Any] = {key: BytesStorageMetadata() for key in _empty_states(num_layers)}
    properties = TensorProperties(dtype=dtype)
    for piece in pieces:
        entry = described.setdefault(piece.tensor.key, TensorStorageMetadata(
            properties=properties, size=torch.Size(piece.tensor.global_shape), chunks=[]))
        entry.chunks.append(ChunkStorageMetadata(offsets=piece.offset, sizes=piece.sizes))
    writer.finish(Metadata(state_dict_metadata=described), [results])
    return sums.hash(), broken


def broken_parts(piece: Piece, data: torch.Tensor) -> list[str]:
    """Which of their tensors bring NaN or infinite numbers into a piece."""
    if is_finite(data):
        return []
    begin, rows = piece.start[0], data.view(piece.size)
    return [part.name for part in piece.tensor.parts_within(begin, begin + piece.size[0])
            if not is_finite(rows[part.start - begin :][: part.rows])]


def _write(writer: FileSystemWriter, stream: Any, file: str, item: WriteItem, data: Any) -> WriteResult:
    return _write_item(writer.transforms, stream, data, item, file, SerializationFormat.TORCH_SAVE)


def _tensor_item(piece: Piece, dtype: torch.dtype) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(piece.tensor.key, piece.offset), type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=piece.offset, sizes=piece.sizes),
            properties=TensorProperties(dtype=dtype), size=torch.Size(piece.tensor.global_shape),
        ),
    )


def _empty_states(num_layers: int) -> Iterator[str]:
    yield COMMON_STATE
    yield from extra_states(num_layers)


def _write_empty_states(writer: FileSystemWriter, stream: Any, file: str, num_layers: int) -> list[WriteResult]:
    """What megatron-core stores beside weights: an empty common state, and empty extra states of linear layers."""
    results = []
    for key in _empty_states(num_layers):
        data = io.BytesIO()
        torch.save([{} if key == COMMON_STATE else None], data)
        results.append(_write(writer, stream, file, WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO),
                              data))
    return results
