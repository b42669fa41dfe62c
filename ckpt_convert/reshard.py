"""`m3 convert reshard SOURCE OUTPUT --tensor T --pipeline P`: the weights of a checkpoint, in one file for each rank.

A checkpoint loads at any layout anyway; this lays its files out so that every rank of one layout reads its own.
Optimizer and generators are left behind: start from the result with `training.init_from`, or generate with it.
"""

import json
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckpt_convert.words import parse_words
from megatron_m3.config import Config, ParallelConfig, stage_layers
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    import torch

    from ckpt_convert.checkpoint_writer import Piece
    from ckpt_convert.mapping import OurTensor


@dataclass(frozen=True, kw_only=True)
class ReshardOptions:
    """What to lay out, and how."""

    source: str
    """Checkpoint, or the folder of a run, whose newest one is taken."""
    output: str
    """Folder of the new run, to make."""
    tensor: int = 1
    """Tensor-parallel processes."""
    pipeline: int = 1
    """Pipeline stages."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    json: bool = False
    """Print the summary as JSON."""


def main(argv: Sequence[str] | None = None) -> None:
    """Lay out, and print what was made."""
    options = parse_words(ReshardOptions, argv, "m3 convert reshard", __doc__ or "", ("source", "output"))
    summary = convert(options)
    if options.json:
        json.dump(summary, sys.stdout, indent=2)
        print()
        return
    print(f"{summary['checkpoint']}: {summary['files']} files for {options.tensor} tensor-parallel processes x "
          f"{options.pipeline} pipeline stages, {summary['dtype']}, weights only (no optimizer)")


def convert(options: ReshardOptions) -> dict[str, Any]:
    """Write the checkpoint, and return what the summary tells."""
    from ckpt_convert.checkpoint_source import CheckpointSource
    from ckpt_convert.checkpoint_writer import DTYPES, write_checkpoint
    from ckpt_convert.finite import warn_of_broken
    from ckpt_convert.sources import is_checkpoint
    from megatron_m3.platform.progress import Progress
    from megatron_m3.tokenizer import Tokenizer

    path = Path(options.source)
    if not is_checkpoint(path):
        raise ConfigError(f"source={path}: not a checkpoint nor the folder of a run; name one")
    source = CheckpointSource(path)
    config = laid_out(source.config, options)
    pieces, dtype = list(rank_pieces(config)), DTYPES[config.training.dtype]

    def save_tokenizer(folder: Path) -> Tokenizer:
        tokenizer = Tokenizer.load(source.path / "tokenizer")
        tokenizer.save(folder)
        return tokenizer

    with Progress("reshard", sum(piece.sizes.numel() for piece in pieces) * dtype.itemsize, "bytes") as progress:
        def make(piece: "Piece") -> "torch.Tensor":
            data = source.region(piece.tensor, piece.start, piece.size).to(dtype)
            progress.advance(data.nbytes)
            return data

        settings = source.manifest.settings
        written = write_checkpoint(
            Path(options.output), config, pieces, make, save_tokenizer, inputs={"checkpoint": source.manifest.hash},
            info=source.manifest.info, step=settings["step"], good=settings["good"],
        )
    warn_of_broken(written.folder, written.broken)
    return {"checkpoint": str(written.folder), "weights_hash": written.weights_hash, "dtype": config.training.dtype,
            "files": len({piece.file for piece in pieces})}


def laid_out(config: Config, options: ReshardOptions) -> Config:
    """The settings of the new checkpoint; a layout that the model cannot have is refused by the field's name."""
    dtype = config.training.dtype if options.dtype == "auto" else options.dtype
    return replace(config, parallel=ParallelConfig(tensor=options.tensor, pipeline=options.pipeline),
                   training=replace(config.training, dtype=dtype, frozen_layers=0))


def rank_pieces(config: Config) -> "Iterator[Piece]":
    """The blocks that each rank holds, in the rank's own file; what ranks hold alike lies in the first one's."""
    from ckpt_convert.checkpoint_writer import cut
    from ckpt_convert.mapping import EMBEDDING, our_tensors

    ranks, ends = config.parallel.tensor, list(accumulate(stage_layers(config)))
    stages: list[list[OurTensor]] = [[] for _ in ends]
    for tensor in our_tensors(config.model):
        if tensor.layer is not None:
            stages[bisect_right(ends, tensor.layer)].append(tensor)
        else:
            stages[0 if tensor.key == EMBEDDING else -1].append(tensor)
    for stage, tensors in enumerate(stages):
        for rank in range(ranks):
            file = f"__{stage * ranks + rank}_0.distcp"
            for tensor in tensors:
                for start, size in rank_blocks(tensor, rank, ranks):
                    yield from cut(tensor, start, size, file)


def rank_blocks(tensor: "OurTensor", rank: int, ranks: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """First position and shape of each block of a tensor that one of ``ranks`` tensor-parallel ranks holds."""
    if tensor.split == "no":
        if rank == 0:
            yield (0,) * len(tensor.shape), tensor.shape
    elif tensor.split == "columns":
        width = tensor.shape[1] // ranks
        yield (0, rank * width), (tensor.shape[0], width)
    else:
        first, rest = 0, tensor.shape[1:]
        for rows in tensor.blocks:
            yield (first + rank * rows // ranks, *[0] * len(rest)), (rows // ranks, *rest)
            first += rows


if __name__ == "__main__":
    exit_on_user_error(main)
