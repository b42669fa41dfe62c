"""What ``m3 convert to-hf --memory`` adds to a folder of transformers: a modelling file, and what it must know."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_convert.families import FAMILIES

if TYPE_CHECKING:
    from ckpt_convert.checkpoint_source import CheckpointSource
    from megatron_m3.tokenizer import Tokenizer

PACKAGE = "ckpt_convert.hf_memory"
MODULE, BANK = "modeling_memory3", "bank_memory3"


def add_memory(source: "CheckpointSource", tokenizer: "Tokenizer", family: str, folder: Path) -> dict[str, Any]:
    """Copy the modelling file, and the one that it imports, into ``folder``; what it needs in ``config.json``.

    ``architectures`` and ``model_type`` stay those of the family, so that the folder loads without it too. A bank says
    its own memory layers, heads and kept tokens; those given here are what the model was trained with.
    """
    for name in (MODULE, BANK):
        text = (Path(__file__).parent / "hf_memory" / f"{name}.py").read_text()
        (folder / f"{name}.py").write_text(text.replace(f"from {PACKAGE}.", "from ."))
    memory = source.config.memory
    return {
        "auto_map": {"AutoModelForCausalLM": f"{MODULE}.Memory3{FAMILIES[family].architecture}"},
        "memory": {
            "hashes": {"checkpoint": source.manifest.settings["weights_hash"], "tokenizer": tokenizer.hash},
            "layers": list(source.config.memory_layers),
            "heads": memory.heads,
            "num_kept_tokens": memory.num_kept_tokens,
            "prefix": memory.prefix,
            "prefix_ids": tokenizer.prefix_ids(memory.prefix),
            "reference_length": memory.reference_length,
            "chunk_length": memory.chunk_length,
            "references_per_chunk": memory.references_per_chunk,
        },
    }
