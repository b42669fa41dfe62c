"""m3 data embed: the vector of every reference, by an embedder that is trained or named here.

Embedders: tfidf (words weighed by rarity; trained on the references, works offline) and transformer (a Hugging Face
encoder such as BGE-M3). A killed job goes on from its last whole block. The embedder lies in OUTPUT/embedder.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, M3Error, exit_on_user_error
from megatron_m3.manifest import BlockFolder, Manifest, is_finished, read_manifest, write_manifest

if TYPE_CHECKING:
    from megatron_m3.references import ReferenceStore
    from megatron_m3.retrieval import Embedder

KIND, SCHEMA = "embeddings", 1
BATCH = 1024
MAX_SIZE = 1 << 16
"""Largest --size: vectors are dense."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    references: str
    """Folder of the references, made by `m3 data references`."""
    output: str
    """Folder to write."""
    embedder: Literal["tfidf", "transformer"] = "tfidf"
    """Kind of embedder."""
    size: int = 1024
    """tfidf: numbers in a vector."""
    sample: int = 1_000_000
    """tfidf: most references that words are counted in; evenly spaced over all."""
    model: str = ""
    """transformer: folder or hub name of the model."""
    pooling: Literal["cls", "mean"] = "cls"
    """transformer: the vector is that of the first token (BGE-M3), or the mean over all."""
    max_length: int = 512
    """transformer: longer texts are cut to this many of its tokens."""

    def __post_init__(self) -> None:
        for name in ("size", "sample", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.size > MAX_SIZE:
            raise ConfigError(f"size={self.size}: must be at most {MAX_SIZE:,}")
        if (self.embedder == "transformer") != bool(self.model):
            raise ConfigError("model: give it with embedder=transformer, and only then")

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the chosen embedder."""
        names = ("size", "sample") if self.embedder == "tfidf" else ("model", "pooling", "max_length")
        return {"embedder": self.embedder} | {name: asdict(self)[name] for name in names}


def run(options: Options) -> None:
    """Make the embedder, write the blocks that are missing, then the manifest."""
    from megatron_m3.platform.progress import Progress
    from megatron_m3.references import ReferenceStore
    from megatron_m3.retrieval import embedder as kinds

    output, references = Path(options.output), ReferenceStore.open(options.references)
    home, inputs = output / "embedder", {"references": references.hash}
    if (home / "manifest.json").exists():
        inputs["embedder"] = read_manifest(home, kinds.KIND, kinds.SCHEMA).hash
    if is_finished(output, KIND, SCHEMA, inputs, options.settings):
        print(f"{output}: made already")
        return
    job = {"kind": KIND, "schema": SCHEMA, "references": references.hash, "settings": options.settings}
    folder = BlockFolder(output, job)
    try:
        embedder = kinds.load_embedder(home) if "embedder" in inputs else make_embedder(options, references, home)
    except M3Error:
        if "embedder" not in inputs:
            shutil.rmtree(output)
        raise
    missing = folder.missing(references.num_blocks)
    with Progress("embedding", len(references), "references") as progress:
        progress.advance(len(references) - sum(len(block_ids(references, index)) for index in missing))
        for index in missing:
            write_block(folder, index, embedder, references, progress.advance)
    files = folder.files(references.num_blocks)
    inputs["embedder"] = embedder.hash
    info = {"references": len(references), "size": embedder.size}
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=options.settings, files=files, info=info)
    write_manifest(output, manifest)
    print(output)


def make_embedder(options: Options, references: "ReferenceStore", folder: Path) -> "Embedder":
    """Train or name the embedder that ``options`` ask for, in ``folder``."""
    import numpy as np

    from megatron_m3.platform.progress import Progress

    if options.embedder == "transformer":
        from megatron_m3.retrieval.transformer import make_transformer

        return make_transformer(options.model, folder, pooling=options.pooling, max_length=options.max_length)
    from megatron_m3.retrieval.tfidf import train_tfidf

    count = min(options.sample, len(references))
    with Progress("counting words", count, "references") as progress:

        def texts() -> Iterator[str]:
            for id in np.linspace(0, len(references) - 1, count).astype(int):
                yield references.text(int(id))
                progress.advance()

        return train_tfidf(texts(), folder, size=options.size, complete=count == len(references))


def block_ids(references: "ReferenceStore", index: int) -> range:
    """Ids of the references in block ``index``."""
    return range(index * references.block_size, min(len(references), (index + 1) * references.block_size))


def write_block(folder: BlockFolder, index: int, embedder: "Embedder", references: "ReferenceStore",
                advance: Callable[[int], None]) -> None:
    """Embed the references of block ``index`` and write their vectors, float32 [N, size]; 0 for deleted ones."""
    import numpy as np

    parts = []
    for ids in batched(block_ids(references, index), BATCH):
        texts = references.texts(ids)
        parts.append(embedder.embed(texts) * np.array([[text != ""] for text in texts], np.float32))
        advance(len(ids))
    folder.write(index, {"vectors": np.concatenate(parts)})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data embed``."""
    run(parse(Options, argv, "m3 data embed", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
