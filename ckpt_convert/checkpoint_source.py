"""Our checkpoints as a source: global tensors read region by region, without building the model.

The files are those of torch.distributed.checkpoint, as megatron-core's dist_checkpointing writes and reads them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from ckpt_convert.families import family_of
from ckpt_convert.mapping import OurTensor, our_tensors, places
from ckpt_convert.sources import Source
from megatron_m3.config import Config, from_dict
from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import check_files
from megatron_m3.model.checkpoint import newest_checkpoint, read_checkpoint


class CheckpointSource(Source):
    """One of our checkpoints, whatever layout wrote it."""

    def __init__(self, path: Path, *, checksums: bool = True) -> None:
        """Open the checkpoint ``path``, or the newest one of the run ``path``, checking ``checksums`` of its files.

        Raises:
            ArtifactError: no checkpoint, or a damaged one.
        """
        self.path = newest_checkpoint(path)
        self.manifest = read_checkpoint(self.path)
        check_files(self.path, self.manifest, checksums=checksums, mend="take another checkpoint")
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
