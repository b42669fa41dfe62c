"""Process of test_convert_memory: convert a model larger than the limit, and print how far resident memory rose."""

import ctypes
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch

HIDDEN, FFN, LAYERS, VOCAB = 1024, 4096, 4, 15000
LARGEST = VOCAB * HIDDEN * 4


def write_model(folder: Path) -> int:
    """A Llama of about 400 MB, written by itself a tensor at a time; its bytes."""
    from ckpt_convert.families import write_config
    from ckpt_convert.mapping import their_shapes
    from megatron_m3.config import ModelConfig
    from tests.hf_models import make_tokenizer

    model = ModelConfig(num_layers=LAYERS, num_heads=16, num_kv_heads=16, head_size=64, hidden_size=HIDDEN,
                        ffn_size=FFN, vocab_size=VOCAB)
    folder.mkdir()
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(write_config(model, "llama", "float32", 512, {})))
    header, begin = {}, 0
    for name, shape in their_shapes(model).items():
        end = begin + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        block = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
        for first in range(0, begin, len(block)):
            stream.write(block[: begin - first])
    return begin


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (highest so far), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def rise[T](job: Callable[[T], object], options: T) -> int:
    """Bytes by which resident memory rises while ``job`` runs; what was freed before is given back first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    job(options)
    return resident("VmHWM") - before


def main() -> None:
    """``convert_peak FOLDER``: prints bytes of the model, of its largest tensor, and the rise of each direction."""
    torch.set_num_threads(1)
    from ckpt_convert import from_hf, to_hf
    from ckpt_convert.sources import open_model
    from ckpt_convert.verify import compare_tensors
    from tests.hf_models import make_model

    folder = Path(sys.argv[1])
    make_model(folder / "small", "llama")
    found = {"model": write_model(folder / "hf"), "largest": LARGEST}
    for size in ("small", "hf"):  # the small one loads what both need
        source, ours, back = (f"{folder}/{size}{end}" for end in ("", "-ours", "-back"))
        found["from"] = rise(from_hf.convert, from_hf.FromOptions(source=source, output=ours))
        found["to"] = rise(to_hf.convert, to_hf.ToOptions(source=ours, output=back))
    found["same"] = compare_tensors(open_model(folder / "hf"), open_model(folder / "hf-back")).passed
    print(json.dumps(found))


if __name__ == "__main__":
    main()
