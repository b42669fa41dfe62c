"""m3 data index: a FAISS index over the references' vectors, with its embedder, so that one folder is all to retrieve.

Few references are compared one by one (a flat index, exact). Many are put into inverted lists, of which a search
reads as many as the wanted recall takes, measured against exact search on a sample.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import (
    Manifest,
    atomic_folder,
    block_name,
    check_files,
    check_input,
    hash_file,
    is_finished,
    map_block,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    import numpy as np

NEIGHBOURS = 5
"""Recall is measured on this many."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    references: str
    """Folder of the references, made by `m3 data references`."""
    embeddings: str
    """Folder of their embeddings, made by `m3 data embed`."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    factory: str = ""
    """FAISS factory string; empty is Flat for up to 200,000 references, IVF...,Flat for more."""
    recall: float = 0.95
    """Indexes with inverted lists: read as many lists as this recall@5 takes."""
    sample: int = 500_000
    """Most vectors that the index is trained on."""
    queries: int = 512
    """Vectors that recall is measured with."""

    def __post_init__(self) -> None:
        for name in ("sample", "queries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"recall={self.recall}: must be above 0, at most 1")


class Embeddings:
    """The vectors that ``m3 data embed`` wrote, memory-mapped."""

    def __init__(self, folder: Path, references_hash: str) -> None:
        """Open an embeddings folder.

        Raises:
            ArtifactError: not an embeddings folder, a damaged one, or one of other references.
        """
        from data_tools.embed import KIND, SCHEMA

        self.manifest = read_manifest(folder, KIND, SCHEMA)
        check_files(folder, self.manifest)
        check_input(folder, self.manifest, "references", references_hash)
        self.folder, self.hash = folder, self.manifest.hash
        self.size: int = self.manifest.info["size"]
        self.count: int = self.manifest.info["references"]

    def blocks(self) -> Iterator["np.ndarray"]:
        """The vectors, float32 [N, size], block after block."""
        for index in range(len(self.manifest.files)):
            yield map_block(self.folder / block_name(index))["vectors"]

    def rows(self, ids: "np.ndarray") -> "np.ndarray":
        """The vectors of ``ids`` [N], float32 [N, size]."""
        import numpy as np

        vectors, first = np.empty((len(ids), self.size), np.float32), 0
        for block in self.blocks():
            here = (ids >= first) & (ids < first + len(block))
            vectors[here] = block[ids[here] - first]
            first += len(block)
        return vectors

    def zeros(self) -> "np.ndarray":
        """Ids of the vectors that are 0, int64: of deleted references and of texts with nothing to go by."""
        import numpy as np

        starts = itertools.accumulate(map(len, self.blocks()), initial=0)
        found = [first + np.flatnonzero(~block.any(axis=1))
                 for first, block in zip(starts, self.blocks(), strict=False)]
        return np.concatenate(found)

    def sample(self, count: int) -> "np.ndarray":
        """``count`` vectors evenly spaced over all, or all if there are fewer."""
        import numpy as np

        return self.rows(np.linspace(0, self.count - 1, min(count, self.count)).astype(np.int64))


def run(options: Options) -> None:
    """Build the index, measure it and write it; nothing is done when it is there already, made from the same inputs."""
    import numpy as np

    from megatron_m3.references import ReferenceStore
    from megatron_m3.retrieval.embedder import copy_embedder
    from megatron_m3.retrieval.index import EMBEDDER, FILE, KIND, NEVER_FOUND, SCHEMA, choose_factory

    output, references = Path(options.output), ReferenceStore.open(options.references)
    embeddings = Embeddings(Path(options.embeddings), references.hash)
    inputs = {"references": references.hash, "embeddings": embeddings.hash}
    settings = {name: value for name, value in asdict(options).items() if name in ("recall", "sample", "queries")}
    settings["factory"] = options.factory or choose_factory(embeddings.count)
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    why = "as asked" if options.factory else f"chosen for {embeddings.count:,} references"
    print(f"index: {settings['factory']} ({why})", file=sys.stderr)
    with atomic_folder(output) as folder:
        info = build(options, settings["factory"], embeddings, folder / FILE)
        if len(never := embeddings.zeros()):
            np.save(folder / NEVER_FOUND, never)
        copy_embedder(embeddings.folder / "embedder", folder / EMBEDDER)
        files = {
            str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files, info=info)
        write_manifest(folder, manifest)
    print(output)


def build(options: Options, factory: str, embeddings: Embeddings, path: Path) -> dict[str, Any]:
    """Train, fill, tune and write the FAISS index; return what is to be known of it."""
    import faiss

    from megatron_m3.platform.progress import Progress
    from megatron_m3.retrieval.index import build_faiss

    with Progress("indexing", embeddings.count, "vectors") as progress:

        def counted() -> Iterator["np.ndarray"]:
            for block in embeddings.blocks():
                yield block
                progress.advance(len(block))

        index = build_faiss(factory, embeddings.size, embeddings.sample(options.sample), counted())
    info = {"vectors": embeddings.count, "size": embeddings.size} | tune(index, options, embeddings)
    faiss.write_index(index, str(path))
    return info


def tune(index: Any, options: Options, embeddings: Embeddings) -> dict[str, Any]:
    """Read as many inverted lists as the wanted recall takes; return the recall and what it took."""
    import faiss

    from megatron_m3.retrieval.index import nearest_exactly

    queries, k = embeddings.sample(options.queries), min(NEIGHBOURS + 1, embeddings.count)
    least = nearest_exactly(queries, embeddings.blocks(), k)[0][:, -1]
    found = recall(index, embeddings, queries, least, k)
    info: dict[str, Any] = {}
    if (lists := faiss.try_extract_index_ivf(index)) is not None:
        while found < options.recall and lists.nprobe < lists.nlist:
            lists.nprobe = min(2 * lists.nprobe, lists.nlist)
            found = recall(index, embeddings, queries, least, k)
        info = {"lists": lists.nlist, "lists_read": lists.nprobe}
        print(f"index: a search reads {lists.nprobe:,} of {lists.nlist:,} lists", file=sys.stderr)
    measured = f"recall@{NEIGHBOURS} {found:.4f} against exact search"
    print(f"index: {measured}, on {len(queries):,} references", file=sys.stderr)
    return info | {"recall": found}


def recall(index: Any, embeddings: Embeddings, queries: "np.ndarray", least: "np.ndarray", k: int) -> float:
    """Share of the neighbours that ``index`` finds, the query itself aside, that are as near as the k-th nearest.

    ``queries`` float32 [N, size] are vectors of the index; ``least`` [N] is the score of each one's k-th nearest.
    """
    import numpy as np

    ids = index.search(queries, k)[1]
    vectors = embeddings.rows(ids.ravel()).reshape(*ids.shape, -1)
    near = (ids >= 0) & (np.einsum("nks,ns->nk", vectors, queries) >= least[:, None] - 1e-5)
    others = near.sum(axis=1) - 1 if k > 1 else near.sum(axis=1)
    return float(np.mean(others.clip(0) / max(1, k - 1)))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data index``."""
    run(parse(Options, argv, "m3 data index", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
