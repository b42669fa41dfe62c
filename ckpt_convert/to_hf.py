"""`m3 convert to-hf SOURCE OUTPUT`: one of our checkpoints becomes a folder that transformers loads.

    m3 convert to-hf run folder
    m3 convert to-hf run folder --memory          with recall from a memory bank, see docs/conversion.md
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckpt_convert.words import parse_words
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    import torch

    from ckpt_convert.checkpoint_source import CheckpointSource

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class ToOptions:
    """What to convert."""

    source: str
    """Checkpoint, or the folder of a run, whose newest one is taken."""
    output: str
    """Folder to make: config.json, safetensors, tokenizer."""
    family: Literal["auto", "llama", "mistral", "qwen2", "qwen3"] = "auto"
    """Architecture to write. auto: the one that was converted, else the first that has the model's parts."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    max_shard_size: str = "5GB"
    """Largest safetensors file: a number of bytes, or one with KB, MB or GB; a larger tensor has a file of its own."""
    memory: bool = False
    """Add a modelling file (trust_remote_code) that opens a memory bank of the checkpoint and generates with recall."""
    json: bool = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1:
            raise ConfigError(f"max_shard_size={self.max_shard_size}: must be above 0")

    @property
    def max_shard_bytes(self) -> int:
        """Bytes of the largest file."""
        found = re.fullmatch(r"(\d+) ?(KB|MB|GB|)", self.max_shard_size.upper())
        if found is None:
            raise ConfigError(f"max_shard_size={self.max_shard_size}: give bytes, or a number with KB, MB or GB")
        return int(found[1]) * UNITS[found[2]]


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what was made."""
    options = parse_words(ToOptions, argv, "m3 convert to-hf", __doc__ or "", ("source", "output"))
    summary = convert(options)
    if options.json:
        json.dump(summary, sys.stdout, indent=2)
        print()
        return
    print(f"{summary['folder']}: {summary['architecture']} in {summary['dtype']}, {summary['bytes']:,} bytes in "
          f"{summary['files']} safetensors file{'s' * (summary['files'] > 1)}")


def convert(options: ToOptions) -> dict[str, Any]:
    """Write the folder, whole or not at all, and return what the summary tells."""
    from ckpt_convert.checkpoint_source import CheckpointSource
    from ckpt_convert.sources import is_checkpoint
    from megatron_m3.manifest import atomic_folder

    path, output = Path(options.source), Path(options.output)
    if not is_checkpoint(path):
        raise ConfigError(f"source={path}: not a checkpoint nor the folder of a run; name one")
    source = CheckpointSource(path)
    with atomic_folder(output) as temporary:
        summary = write_folder(source, temporary, options)
    return {"folder": str(output)} | summary


def write_folder(source: "CheckpointSource", folder: Path, options: ToOptions) -> dict[str, Any]:
    """Write config, tokenizer, weights and manifest into ``folder``, and return what the summary tells."""
    import torch

    from ckpt_convert.families import FAMILIES, family_of, write_config
    from ckpt_convert.finite import warn_of_broken
    from ckpt_convert.memory_folder import add_memory
    from ckpt_convert.tokenizer_files import write_tokenizer
    from megatron_m3.manifest import Manifest, hash_file, write_manifest
    from megatron_m3.tokenizer import Tokenizer

    family = family_of(source.model, source.family if options.family == "auto" else options.family)
    dtype = {"auto": source.dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    tokenizer = Tokenizer.load(source.path / "tokenizer")
    write_tokenizer(tokenizer, folder)
    fields = write_config(source.model, family, str(dtype).removeprefix("torch."), source.config.data.sequence_length,
                          {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id})
    if options.memory:
        fields |= add_memory(source, tokenizer, family, folder)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    files, broken = write_weights(source, folder, dtype, options.max_shard_bytes)
    write_manifest(folder, Manifest(
        kind="transformers", schema=1, settings={"family": family, "dtype": fields["torch_dtype"]},
        inputs={"checkpoint": source.manifest.hash, "weights": source.manifest.settings["weights_hash"]},
        files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
    ))
    warn_of_broken(Path(options.output), broken)
    return {"family": family, "architecture": FAMILIES[family].architecture, "dtype": fields["torch_dtype"],
            "files": len(files), "bytes": sum((folder / name).stat().st_size for name in files)}


def write_weights(source: "CheckpointSource", folder: Path, dtype: "torch.dtype", max_bytes: int
                  ) -> tuple[list[str], list[str]]:
    """Write the tensors as safetensors, a band of rows at a time; names of the files, and of the tensors that hold NaN
    or infinite numbers."""
    from ckpt_convert.checkpoint_writer import check_space
    from ckpt_convert.mapping import their_shapes
    from ckpt_convert.sources import INDEX, SINGLE
    from megatron_m3.platform.progress import Progress

    shapes = their_shapes(source.model)
    sizes = {name: _count(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _share_out(sizes, max_bytes)
    check_space(folder, sum(sizes.values()))
    files = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    broken: list[str] = []
    with Progress("convert", sum(sizes.values()), "bytes") as progress:
        for file, names in zip(files, shards, strict=True):
            broken += _write_safetensors(folder / file, source, dtype, {name: shapes[name] for name in names},
                                         progress.advance)
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files, broken


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _share_out(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_safetensors(path: Path, source: "CheckpointSource", dtype: "torch.dtype",
                       shapes: dict[str, tuple[int, ...]], done: Callable[[int], None]) -> list[str]:
    """Write one file; names of the tensors that hold NaN or infinite numbers."""
    import torch

    from ckpt_convert.finite import is_finite

    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, broken = 0, list[str]()
    for name, shape in shapes.items():
        end = begin + _count(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for _, _, rows in source.bands(name):
                data = rows.to(dtype).contiguous()
                broken += [] if is_finite(data) else [name]
                stream.write(data.view(torch.uint8).numpy())
                done(data.nbytes)
    return broken


if __name__ == "__main__":
    exit_on_user_error(main)
