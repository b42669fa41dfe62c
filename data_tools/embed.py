"""m3 data embed: the vector of every reference, by an embedder that is trained or named here.

Embedders: tfidf (words weighed by rarity; trained on the references, works offline) and transformer (a
sentence-transformers model such as BGE-M3, by folder or hub name, used as its own configuration says). The embedder
lies in OUTPUT/embedder; one process makes it. Start the same command as often as wanted, anywhere: the jobs share the
blocks, and a killed one is not missed.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_tools.shared_work import Workers, clear_refused, share, take_gpu
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, M3Error, exit_on_user_error
from megatron_m3.manifest import BlockFolder, Manifest, is_finished, read_manifest, write_manifest
from megatron_m3.platform.threads import one_torch_thread

if TYPE_CHECKING:
    from megatron_m3.references import ReferenceStore
    from megatron_m3.retrieval import Embedder

KIND, SCHEMA = "embeddings", 1
BATCH = 2048
MAX_SIZE = 1 << 16
"""Largest --size: vectors are dense."""
OF_TRANSFORMER = ("pooling", "max_length", "query_prompt", "document_prompt", "dtype")


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
    """transformer: folder or hub name (OWNER/NAME) of the model."""
    pooling: Literal["auto", "cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"] = "auto"
    """transformer: how the vectors of the tokens become one; auto for what the model says."""
    max_length: int | None = None
    """transformer: longer texts are cut to this many of its tokens; by default to as many as the model says."""
    query_prompt: str | None = None
    """transformer: is put before each text that asks; by default what the model says."""
    document_prompt: str | None = None
    """transformer: is put before each reference; by default what the model says."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """transformer: type that it computes in."""
    workers: int = 1
    """Processes here, of one thread or one GPU each; more jobs of the same command, on any machine, share too."""

    def __post_init__(self) -> None:
        for name in ("size", "sample", "max_length", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.size > MAX_SIZE:
            raise ConfigError(f"size={self.size}: must be at most {MAX_SIZE:,}")
        if (self.embedder == "transformer") != bool(self.model):
            raise ConfigError("model: give it with embedder=transformer, and only then")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the chosen embedder."""
        names = ("size", "sample") if self.embedder == "tfidf" else ("model", *OF_TRANSFORMER)
        return {"embedder": self.embedder} | {name: asdict(self)[name] for name in names}


def run(options: Options) -> None:
    """Make the embedder, write the blocks that are missing, then the manifest."""
    from megatron_m3.references import ReferenceStore
    from megatron_m3.retrieval import embedder as kinds

    if options.embedder == "transformer" and options.workers > 1:
        from megatron_m3.platform import count_gpus

        check_workers(options.workers, count_gpus())
    output, references = Path(options.output), ReferenceStore.open(options.references)
    work = Work(output, options, {"kind": KIND, "schema": SCHEMA, "references": references.hash,
                                  "settings": options.settings})
    inputs = {"references": references.hash}
    if work.done(0):
        inputs["embedder"] = read_manifest(work.home, kinds.KIND, kinds.SCHEMA).hash
    if is_finished(output, KIND, SCHEMA, inputs, options.settings):
        print(f"{output}: made already")
        return
    blocks = BlockFolder(output, work.job)
    make_embedder(work, references)
    embedder = read_manifest(work.home, kinds.KIND, kinds.SCHEMA)
    sizes = [len(block_ids(references, index)) for index in range(references.num_blocks)]
    with Workers(options.workers) as workers:
        workers.run("embedding", blocks, sizes, "references", functools.partial(write_block, work))
    files = blocks.files(references.num_blocks)
    inputs["embedder"] = embedder.hash
    info = {"references": len(references), "size": embedder.settings["size"]}
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=options.settings, files=files, info=info)
    write_manifest(output, manifest)
    print(output)


def check_workers(workers: int, gpus: int) -> None:
    """Refuse workers of a transformer that would share a GPU.

    Raises:
        ConfigError: there are GPUs, but fewer than workers.
    """
    if 0 < gpus < workers:
        raise ConfigError(f"workers={workers}: each takes a GPU of its own, and {gpus} can be seen here; give at most "
                          f"{gpus}, or make CUDA_VISIBLE_DEVICES empty to compute on the CPU")


class Work:
    """What a process needs to embed; opened when first asked for, so that it can be sent to another."""

    def __init__(self, folder: Path, options: Options, job: dict[str, Any]) -> None:
        self.folder, self.home, self.options, self.job = folder, folder / "embedder", options, job

    def done(self, index: int) -> bool:
        """Whether the embedder, the only piece of work before the blocks, is made."""
        return (self.home / "manifest.json").exists()

    @functools.cached_property
    def references(self) -> "ReferenceStore":
        """What is embedded."""
        from megatron_m3.references import ReferenceStore

        return ReferenceStore.open(self.options.references)

    @functools.cached_property
    def embedder(self) -> "Embedder":
        """By which; a worker's is on the GPU of its number."""
        from megatron_m3.retrieval import load_embedder

        take_gpu()
        return load_embedder(self.home)


def make_embedder(work: Work, references: "ReferenceStore") -> None:
    """Have the embedder made by one of the processes that come here; the others wait for it.

    Raises:
        M3Error: it cannot be made; nothing is left then.
    """

    def make(index: int) -> None:
        try:
            train_or_name(work.options, references, work.home)
        except (M3Error, OSError):
            if not work.done(index):  # by another, that was only thought to be dead
                raise

    with clear_refused(work.folder, M3Error):
        for looks, index in enumerate(share(work, 1, make)):
            if (looks, index) == (0, -1):
                print("embedder: another job makes it; waiting", file=sys.stderr)


def train_or_name(options: Options, references: "ReferenceStore", folder: Path) -> None:
    """Write the embedder that ``options`` ask for to ``folder``."""
    import numpy as np

    from megatron_m3.platform.progress import Progress

    if options.embedder == "transformer":
        from megatron_m3.retrieval.transformer import make_transformer

        make_transformer(options.model, folder, **{name: getattr(options, name) for name in OF_TRANSFORMER})
        return
    from megatron_m3.retrieval.tfidf import train_tfidf

    count = min(options.sample, len(references))
    with Progress("counting words", count, "references") as progress:

        def texts() -> Iterator[str]:
            for id in np.linspace(0, len(references) - 1, count).astype(int):
                yield references.text(int(id))
                progress.advance()

        train_tfidf(texts(), folder, size=options.size, complete=count == len(references))


def block_ids(references: "ReferenceStore", index: int) -> range:
    """Ids of the references in block ``index``."""
    return range(index * references.block_size, min(len(references), (index + 1) * references.block_size))


def write_block(work: Work, index: int) -> None:
    """Embed the references of block ``index`` and write their vectors, float32 [N, size]; 0 for deleted ones."""
    import numpy as np

    parts = []
    # a transformer's last bits may differ with several threads, and workers are faster
    with one_torch_thread() if work.options.embedder == "transformer" else contextlib.nullcontext():
        for ids in batched(block_ids(work.references, index), BATCH):
            texts = work.references.texts(ids)
            parts.append(work.embedder.embed(texts) * np.array([[text != ""] for text in texts], np.float32))
    BlockFolder(work.folder, work.job).write(index, {"vectors": np.concatenate(parts)})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data embed``."""
    run(parse(Options, argv, "m3 data embed", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
