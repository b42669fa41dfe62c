"""A small real knowledge base: texts, references, embeddings and index, made by the tools."""

import json
from pathlib import Path

from tests.tiny_model import sentence


def build_knowledge(folder: Path, tokenizer: Path, *, count: int, words: int, reference_length: int) -> dict[str, Path]:
    """Folders of ``references`` and ``index`` over ``count`` sentences of ``words`` words."""
    from data_tools import embed, index, references

    lines = [json.dumps({"id": str(seed), "text": sentence(1000 + seed, words)}) for seed in range(count)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    paths = {name: folder / name for name in ("references", "embeddings", "index")}
    references.main(
        [
            "--input",
            str(folder / "texts.jsonl"),
            "--tokenizer",
            str(tokenizer),
            "--output",
            str(paths["references"]),
            "--reference-length",
            str(reference_length),
        ]
    )
    embed.main(["--references", str(paths["references"]), "--output", str(paths["embeddings"])])
    index.main(
        [
            "--references",
            str(paths["references"]),
            "--embeddings",
            str(paths["embeddings"]),
            "--output",
            str(paths["index"]),
        ]
    )
    return paths
