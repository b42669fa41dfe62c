"""`m3 convert from-hf SOURCE OUTPUT`: a Hugging Face folder or a GGUF file becomes one of our checkpoints.

    m3 convert from-hf SmolLM2-135M-Instruct.Q4_1.gguf run
    m3 convert verify SmolLM2-135M-Instruct.Q4_1.gguf run
    m3 generate --checkpoint run --no-memory --prompt "The heron is"
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckpt_convert.words import parse_words
from megatron_m3.config import Config, MemoryConfig, ModelConfig, TrainingConfig
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    import torch

    from ckpt_convert.checkpoint_writer import Piece
    from ckpt_convert.sources import Source


@dataclass(frozen=True, kw_only=True)
class FromOptions:
    """What to convert."""

    source: str
    """Folder with config.json, tokenizer.json and safetensors, or a GGUF file."""
    output: str
    """Folder to make; it can be given wherever a checkpoint or a run's folder is asked for."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights. auto: bf16 if all of them are, else fp32, so that nothing is rounded."""
    memory_layers: str = "middle"
    """Memory layers: middle (27 % to 80 % of the depth), first-half, all, or ranges such as 8-24."""
    json: bool = False
    """Print the summary as JSON."""


def middle_layers(num_layers: int) -> str:
    """The band of layers in which a model reads memories best without training for it (8-24 of 30)."""
    last = min(num_layers - 1, round(0.8 * num_layers))
    return f"{min(last, round(0.27 * num_layers))}-{last}"


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what was made."""
    options = parse_words(FromOptions, argv, "m3 convert from-hf", __doc__ or "", ("source", "output"))
    summary = convert(options)
    if options.json:
        json.dump(summary, sys.stdout, indent=2)
        print()
        return
    print(f"{summary['checkpoint']}: {summary['family']}, {summary['parameters']:,} parameters in {summary['dtype']}, "
          f"memory layers {summary['memory_layers']}, prefix {summary['prefix']}")
    if summary["bos_is"] != "bos_token":
        print(f"{summary['family']} names no BOS: {summary['bos']} ({summary['bos_is']}) begins texts and prefixes")


def convert(options: FromOptions) -> dict[str, str | int]:
    """Write the checkpoint, and return what the summary tells; nothing is written if anything is unsupported."""
    from ckpt_convert.checkpoint_writer import DTYPES, refuse_output, write_checkpoint
    from ckpt_convert.finite import warn_of_broken
    from ckpt_convert.sources import FileSource, open_model
    from ckpt_convert.tokenizer_files import check_tokenizer, source_tokenizer
    from megatron_m3.manifest import hash_file, hash_json
    from megatron_m3.platform.progress import Progress
    from megatron_m3.tokenizer import Tokenizer

    path, output = Path(options.source), Path(options.output)
    source = open_model(path)
    if not isinstance(source, FileSource):
        raise ConfigError(f"source={path}: is a checkpoint of ours already; see m3 convert to-hf and reshard")
    check_tokenizer(path)
    refuse_output(output)
    config = model_config(source, options)
    found: list[Tokenizer] = []

    def save_tokenizer(folder: Path) -> Tokenizer:
        found.append(source_tokenizer(path, source.model.vocab_size, folder))
        return found[0]

    files = sorted({tensor.path for tensor in source.tensors.values()} | set(path.glob("config.json")))
    hashes = {"source": hash_json({file.name: hash_file(file) for file in files})}
    pieces, dtype = list(stored_pieces(source.model)), DTYPES[config.training.dtype]
    total = sum(piece.sizes.numel() for piece in pieces) * dtype.itemsize
    with Progress("convert", total, "bytes") as progress:
        def make(piece: "Piece") -> "torch.Tensor":
            data = assemble(source, piece, dtype)
            progress.advance(data.nbytes)
            return data

        written = write_checkpoint(output, config, pieces, make, save_tokenizer, inputs=hashes,
                                   info={"family": source.family, "source": path.name})
    warn_of_broken(written.folder, written.broken)
    settings = found[0].manifest.settings
    return {
        "checkpoint": str(written.folder), "family": source.family, "dtype": config.training.dtype,
        "weights_hash": written.weights_hash, "memory_layers": config.memory.layers,
        "parameters": sum(piece.sizes.numel() for piece in pieces) - padding(source.model),
        "bos": settings["bos"], "bos_is": settings["bos_is"], "eos": settings["eos"],
        "prefix": settings["bos"] + config.memory.prefix,
    }


def model_config(source: "Source", options: FromOptions) -> Config:
    """The settings that the checkpoint records."""
    import torch

    stored: Literal["fp32", "bf16"] = "bf16" if source.dtype == torch.bfloat16 else "fp32"
    layers = options.memory_layers
    return Config(
        model=source.model,
        memory=MemoryConfig(layers=middle_layers(source.model.num_layers) if layers == "middle" else layers),
        training=TrainingConfig(dtype=stored if options.dtype == "auto" else options.dtype),
    )


def padding(model: ModelConfig) -> int:
    """Numbers of the rows that only fill the vocabulary up."""
    matrices = 1 if model.tie_embeddings else 2
    return matrices * (model.padded_vocab_size - model.vocab_size) * model.hidden_size


def stored_pieces(model: ModelConfig) -> "Iterator[Piece]":
    """Every tensor whole, but for very large ones, all in one file."""
    from ckpt_convert.checkpoint_writer import cut
    from ckpt_convert.mapping import our_tensors

    for tensor in our_tensors(model):
        yield from cut(tensor, (0,) * len(tensor.shape), tensor.shape, "__0_0.distcp")


def assemble(source: "Source", piece: "Piece", dtype: "torch.dtype") -> "torch.Tensor":
    """The numbers of a piece that spans all columns of its tensor, from the source's tensors; padding is zero."""
    import torch

    out = torch.zeros(piece.size, dtype=dtype)
    begin = piece.start[0]
    step = max(1, (16 << 20) // (4 * max(1, out[:1].numel())))
    for part in piece.tensor.parts_within(begin, begin + piece.size[0]):
        for first in range(0, part.rows if part.name else 0, step):
            count = min(step, part.rows - first)
            rows = source.rows(part.name, part.their_start + first, part.their_start + first + count)
            out[part.start - begin + first : part.start - begin + first + count] = rows
    return out


if __name__ == "__main__":
    exit_on_user_error(main)
