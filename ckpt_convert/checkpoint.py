"""Our checkpoints without the model: global tensors read region by region, written piece by piece.

The files are those of torch.distributed.checkpoint, as megatron-core's dist_checkpointing writes and reads them.
"""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
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
from torch.distributed.checkpoint.utils import _create_file_view

from ckpt_convert.families import family_of
from ckpt_convert.mapping import OurTensor, extra_states, our_tensors, places
from ckpt_convert.sources import Source
from megatron_m3.config import Config, from_dict, to_dict
from megatron_m3.errors import ArtifactError, M3Error
from megatron_m3.manifest import Manifest, atomic_folder, check_files, hash_file, write_manifest
from megatron_m3.model.checkpoint import KIND, SCHEMA, checkpoint_folder, list_checkpoints, read_checkpoint
from megatron_m3.model.weights_hash import WeightSums

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer

COMMON_STATE = "common_state/shard_0_1"
BACKEND = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


class CheckpointSource(Source):
    """One of our checkpoints, whatever layout wrote it."""

    def __init__(self, path: Path) -> None:
        """Open the checkpoint ``path``, or the newest one of the run ``path``, checking all checksums.

        Raises:
            ArtifactError: no checkpoint, or a damaged one.
        """
        self.path = (list_checkpoints(path) or [path])[-1]
        self.manifest = read_checkpoint(self.path)
        check_files(self.path, self.manifest, checksums=True, mend="take another checkpoint")
        self.config = from_dict(Config, self.manifest.settings["config"])
        self.model = self.config.model
        self.family = str(self.manifest.info.get("family") or family_of(self.model))
        self.metadata = FileSystemReader(self.path).read_metadata()
        self.places = places(self.model)
        self.chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for tensor in our_tensors(self.model):
            stored = self.metadata.state_dict_metadata.get(tensor.key)
            if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != tensor.global_shape:
                raise ArtifactError(f"{self.path}: {tensor.key} is not there in the shape {tensor.global_shape} that "
                                    "the config asks for; take another checkpoint")
            self.dtype = stored.properties.dtype
            self.chunks[tensor.key] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """See :class:`Source`."""
        out: torch.Tensor | None = None
        for tensor, part in self.places[name]:
            begin, end = max(first, part.their_start), min(last, part.their_start + part.rows)
            if begin < end:
                start = part.start + begin - part.their_start
                found = self.region(tensor, (start, *[0] * (len(tensor.shape) - 1)),
                                    (end - begin, *tensor.shape[1:]))
                if end - begin == last - first:
                    return found
                if out is None:
                    out = torch.empty((last - first, *tensor.shape[1:]), dtype=self.dtype)
                out[begin - first : end - first] = found
        assert out is not None, name
        return out

    def region(self, tensor: OurTensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """The block of ``size`` at ``start`` of one of our tensors, put together from what the files hold of it."""
        first, length = tensor.offset(*start), (*[1] * (tensor.layer is not None), *size)
        out = torch.empty(length, dtype=self.dtype)
        missing = out.numel()
        for offset, extent in self.chunks[tensor.key]:
            begin = [max(a, b) for a, b in zip(first, offset, strict=True)]
            end = [min(a + n, b + m) for a, n, b, m in zip(first, length, offset, extent, strict=True)]
            if all(a < b for a, b in zip(begin, end, strict=True)):
                inside = [slice(a - b, c - b) for a, b, c in zip(begin, offset, end, strict=True)]
                target = [slice(a - b, c - b) for a, b, c in zip(begin, first, end, strict=True)]
                part = self._read(tensor.key, offset, extent, inside)
                out[tuple(target)] = part
                missing -= part.numel()
        if missing:
            raise ArtifactError(f"{self.path}: {tensor.key} lacks {missing:,} numbers; take another checkpoint")
        return out[0] if tensor.layer is not None else out

    def _read(self, key: str, offset: tuple[int, ...], extent: tuple[int, ...], inside: list[slice]) -> torch.Tensor:
        """A block of one stored piece; only the rows that it touches are read."""
        where = self.metadata.storage_data[MetadataIndex(key, torch.Size(offset))]
        # all axes before the last two are one
        rows = 1 if len(extent) == 1 else extent[-2]
        lead, row = (slice(0, 1), slice(0, 1)) if len(extent) == 1 else (
            inside[0] if len(extent) == 3 else slice(0, 1), inside[-2])
        assert lead.stop - lead.start == 1, "pieces are read one layer at a time"
        row_numbers = extent[-1]
        first = (lead.start * rows + row.start) * row_numbers
        count = (row.stop - row.start) * row_numbers
        with (self.path / where.relative_path).open("rb") as stream:
            begin = where.offset + _data_offset(_create_file_view(stream, where.offset, where.length))
            stream.seek(begin + first * self.dtype.itemsize)
            data = bytearray(count * self.dtype.itemsize)
            if stream.readinto(data) != len(data):
                raise ArtifactError(f"{self.path / where.relative_path}: cut short; take another checkpoint")
        block = torch.frombuffer(data, dtype=self.dtype).view(-1, row_numbers)[:, inside[-1]]
        return block.reshape([one.stop - one.start for one in inside])


def _data_offset(view: Any) -> int:
    """Where a tensor's numbers begin in what torch.save wrote of it."""
    described = torch.load(view, map_location="meta", weights_only=True)
    assert described.is_contiguous(), "pieces are stored contiguously"
    assert described.storage_offset() == 0, "pieces are stored in storages of their own"
    view.seek(0)
    reader: Any = torch._C.PyTorchFileReader(view)
    return int(reader.get_record_offset("data/0"))


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


class _Writer(FileSystemWriter):
    """torch's writer of the metadata, without its random name for each saving: same numbers, same bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_checkpoint(output: Path, config: Config, pieces: Sequence[Piece], make: Callable[[Piece], torch.Tensor],
                     save_tokenizer: Callable[[Path], "Tokenizer"], *, inputs: dict[str, str], info: dict[str, Any],
                     step: int = 0, good: bool = True) -> tuple[Path, str]:
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

    Returns:
        The checkpoint's folder and the fingerprint of its weights.

    Raises:
        ArtifactError: ``output`` is taken.
        M3Error: the disk is too small, or refuses.
    """
    refuse_output(output)
    folder = checkpoint_folder(output, step)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.training.dtype]
    with atomic_folder(folder) as temporary:
        _check_space(temporary, sum(piece.sizes.numel() for piece in pieces) * dtype.itemsize)
        tokenizer = save_tokenizer(temporary / "tokenizer")
        try:
            fingerprint = _write_pieces(temporary, config.model.num_layers, dtype, pieces, make)
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
    return folder, fingerprint


def refuse_output(output: Path) -> None:
    """Refuse an output that holds something already, by name.

    Raises:
        ArtifactError: it exists, and is more than what an interrupted conversion left.
    """
    if output.is_file() or (output.is_dir() and any(not path.name.endswith(".tmp") for path in output.iterdir())):
        raise ArtifactError(f"{output}: exists already; remove it or choose another folder")


def _check_space(folder: Path, needed: int) -> None:
    stat = os.statvfs(folder)
    if needed > stat.f_bavail * stat.f_frsize:
        raise M3Error(f"{folder.parent}: {needed:,} bytes needed, {stat.f_bavail * stat.f_frsize:,} free; "
                      "free space, or choose another folder")


def _write_pieces(folder: Path, num_layers: int, dtype: torch.dtype, pieces: Sequence[Piece],
                  make: Callable[[Piece], torch.Tensor]) -> str:
    """Write all pieces and their metadata; the fingerprint of the weights."""
    sums, results, writer = WeightSums(), [], _Writer(folder)
    for number, (file, group) in enumerate(groupby(pieces, key=lambda piece: piece.file)):
        with (folder / file).open("wb") as stream:
            if number == 0:
                results += _write_empty_states(writer, stream, file, num_layers)
            for piece in group:
                data = make(piece).view(piece.sizes)
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
    return sums.hash()


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


def _empty_states(num_layers: int) -> Iterable[str]:
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
