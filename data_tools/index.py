"""m3 data index: a FAISS index over the references' vectors, with its embedder, so that one folder is all to retrieve.

Few references are compared one by one (a flat index, exact). Many are put into inverted lists, and compressed where
they would not fit in memory; a search reads as many lists as the wanted recall takes, measured against exact search on
a sample. One process trains and puts together; any number encode: start the command as often as wanted, anywhere.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.embeddings import Embeddings
from data_tools.shared_work import STAGES, Workers, clear_refused, is_made, stages
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import (
    BlockFolder,
    Manifest,
    atomic_path,
    hash_file,
    map_block,
    read_manifest,
    write_manifest,
)
from megatron_m3.platform.threads import one_faiss_thread

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
    """Folder to write."""
    factory: str = ""
    """FAISS factory string; empty is Flat for up to 200,000 references, IVF...,Flat for up to 16 GiB of vectors, and
    OPQ...,IVF...,PQ64 for more."""
    recall: float = 0.95
    """Inverted lists and HNSW: search as widely as this recall@5 takes."""
    sample: int = 0
    """Most vectors that the index is trained on; 0 is 40 for each inverted list, and at least 100,000."""
    queries: int = 512
    """Vectors that recall is measured with."""
    workers: int = 1
    """Processes here, of one thread each; more jobs of the same command, on any machine, share the blocks too."""

    def __post_init__(self) -> None:
        for name, least in (("sample", 0), ("queries", 1), ("workers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"recall={self.recall}: must be above 0, at most 1")


class IndexFolder(BlockFolder):
    """The output, whose one block is the index."""

    def name(self, index: int) -> str:
        """Its file name."""
        from megatron_m3.retrieval.index import FILE

        return FILE


class IndexBuild:
    """The stages, which processes share; each method named after one writes its block of a number."""

    def __init__(self, options: Options, factory: str, embeddings: Embeddings, job: dict[str, Any]) -> None:
        self.options, self.factory, self.embeddings = options, factory, embeddings
        self.output = IndexFolder(Path(options.output), job)
        self.trained = BlockFolder(self.output.folder / STAGES / "train", job | {"stage": "train"})
        self.encoded = BlockFolder(self.output.folder / STAGES / "encode", job | {"stage": "encode"})
        self.k = min(NEIGHBOURS + 1, embeddings.count)
        self._loaded: tuple[Any, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    def num_trained_on(self) -> int:
        """Vectors in the sample."""
        from data_tools.faiss_build import make_faiss, sample_size

        needed = sample_size(make_faiss(self.factory, self.embeddings.size, self.embeddings.count))
        return min(self.embeddings.count, self.options.sample or needed) if needed else 0

    def train(self, index: int) -> None:
        """The trained index, empty, and the queries that recall is measured with."""
        import faiss

        from data_tools.faiss_build import train_faiss

        sample = self.embeddings.sample(max(1, self.num_trained_on()))
        trained = faiss.serialize_index(train_faiss(self.factory, self.embeddings.size, sample))
        self.trained.write(index, {"index": trained, "queries": self.embeddings.sample(self.options.queries)})

    def load(self) -> tuple[Any, "np.ndarray"]:
        """What :meth:`train` made, read once in a process: never to be filled."""
        import faiss
        import numpy as np

        if self._loaded is None:
            block = map_block(self.trained.checked(0))
            self._loaded = faiss.deserialize_index(np.array(block["index"])), np.array(block["queries"])
        return self._loaded

    def encode(self, index: int) -> None:
        """Codes of a block's vectors, its zero vectors, and the scores of those nearest to the queries."""
        import faiss
        import numpy as np

        from data_tools.faiss_build import encode, gives_codes, refusals

        (trained, queries), vectors = self.load(), np.array(self.embeddings.block(index, check=True))
        with one_faiss_thread():
            scores, _ = faiss.knn(queries, vectors, min(self.k, len(vectors)), faiss.METRIC_INNER_PRODUCT)
        zeros = sum(self.embeddings.sizes[:index]) + np.flatnonzero(~vectors.any(axis=1))
        arrays: dict[str, np.ndarray] = {"scores": scores, "zeros": zeros}
        if gives_codes(trained):
            with refusals(self.factory, self.embeddings.size, self.embeddings.count):
                arrays["codes"] = encode(trained, vectors)
        self.encoded.write(index, arrays)

    def parts(self, name: str) -> Iterator["np.ndarray"]:
        """An array of every block that :meth:`encode` wrote."""
        for index in range(len(self.embeddings.sizes)):
            yield map_block(self.encoded.checked(index))[name]

    def merge(self, index: int) -> None:
        """The whole output but for its manifest: the index filled and tuned, by one thread."""
        import faiss
        import numpy as np

        from data_tools.faiss_build import add_codes, gives_codes, refusals, tune

        (whole, queries), self._loaded = self.load(), None
        info: dict[str, Any] = {}
        with one_faiss_thread(), self.output.writing(index, info) as path:
            with refusals(self.factory, self.embeddings.size, self.embeddings.count):
                if gives_codes(whole):
                    add_codes(whole, lambda: self.parts("codes"))
                else:
                    for block in self.embeddings.blocks():
                        whole.add(np.ascontiguousarray(block))
            least = np.sort(np.concatenate(list(self.parts("scores")), axis=1), axis=1)[:, -self.k]
            found = tune(whole, self.options.recall, lambda: recall(whole, self.embeddings, queries, least, self.k))
            info |= {"vectors": self.embeddings.count, "size": self.embeddings.size, "queries": len(queries)} | found
            info["files"] = self.write_others(np.concatenate(list(self.parts("zeros"))))
            with path.open("wb") as stream:  # FAISS by itself takes no notice of a disk that is full at the end
                faiss.write_index(whole, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]

    def write_others(self, zeros: "np.ndarray") -> dict[str, Any]:
        """The embedder, and which references are never found; returns their entries of the manifest."""
        import numpy as np

        from megatron_m3.retrieval.embedder import copy_embedder
        from megatron_m3.retrieval.index import EMBEDDER, NEVER_FOUND

        folder = self.output.folder
        shutil.rmtree(folder / EMBEDDER, ignore_errors=True)
        copy_embedder(self.embeddings.folder / "embedder", folder / EMBEDDER)
        paths = sorted((folder / EMBEDDER).iterdir())
        if len(zeros):
            with atomic_path(folder / NEVER_FOUND) as path, path.open("wb") as stream:
                np.save(stream, zeros)
            paths.append(folder / NEVER_FOUND)
        return {str(path.relative_to(folder)): hash_file(path) for path in paths}


def run(options: Options) -> None:
    """Do what is missing of the stages, then write the manifest; nothing is done when it is there already."""
    from data_tools.faiss_build import choose_factory
    from megatron_m3.references import ReferenceStore
    from megatron_m3.retrieval.index import KIND, SCHEMA

    output, references = Path(options.output), ReferenceStore.open(options.references)
    embeddings = Embeddings(Path(options.embeddings), references.hash)
    inputs = {"references": references.hash, "embeddings": embeddings.hash}
    settings = {name: value for name, value in asdict(options).items() if name in ("recall", "sample", "queries")}
    settings["factory"] = options.factory or choose_factory(embeddings.count, embeddings.size)

    if is_made(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    announce(options, settings["factory"], embeddings)
    report(options, settings["factory"], build(options, settings, inputs, embeddings))
    print(output)


def build(options: Options, settings: dict[str, Any], inputs: dict[str, str], embeddings: Embeddings) -> dict[str, Any]:
    """All stages, then the manifest, whose ``info`` is returned."""
    from megatron_m3.retrieval.index import FILE, KIND, SCHEMA

    output = Path(options.output)
    work = IndexBuild(options, settings["factory"], embeddings,
                      {"kind": KIND, "schema": SCHEMA, "inputs": inputs, "settings": settings})
    finished = stages(output / STAGES, lambda: is_made(output, KIND, SCHEMA, inputs, settings))
    with clear_refused(output), finished, Workers(options.workers) as workers:
        workers.run("index, training", work.trained, [work.num_trained_on()], "vectors", work.train)
        workers.run("index, encoding", work.encoded, embeddings.sizes, "vectors", work.encode)
        workers.run("index, merging", work.output, [embeddings.count], "vectors", work.merge)
        info = work.output.read_info(0)
        files = {FILE: work.output.entry(0)} | info.pop("files")
        write_manifest(output, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files,
                                        info=info))
    return read_manifest(output, KIND, SCHEMA).info


def announce(options: Options, factory: str, embeddings: Embeddings) -> None:
    """Say what is made, why, and the memory it will take.

    Raises:
        ConfigError: FAISS cannot make it.
    """
    from data_tools.faiss_build import make_faiss, memory, refusals

    with refusals(factory, embeddings.size, embeddings.count):
        size = memory(make_faiss(factory, embeddings.size, embeddings.count), embeddings.count)
    why = "as asked" if options.factory else f"chosen for {embeddings.count:,} references"
    exact = ", every vector compared: exact" if factory == "Flat" else ""
    print(f"index: {factory} ({why}{exact}), about {size / 1e9:.3g} GB on disk and in memory", file=sys.stderr)


def report(options: Options, factory: str, info: dict[str, Any]) -> None:
    """Say what recall was reached, by how wide a search, and what would reach what was wanted."""
    from data_tools.faiss_build import make_faiss, memory, num_lists

    if "lists" in info:
        print(f"index: a search reads {info['lists_read']:,} of {info['lists']:,} lists", file=sys.stderr)
    if "ef_search" in info:
        print(f"index: a search keeps {info['ef_search']:,} candidates (efSearch)", file=sys.stderr)
    print(f"index: recall@{NEIGHBOURS} {info['recall']:.4f} against exact search, on {info['queries']:,} references",
          file=sys.stderr)
    if info["recall"] < options.recall:
        count, size = info["vectors"], info["size"]
        others = [f"{one} ({memory(make_faiss(one, size, count), count) / 1e9:.3g} GB)"
                  for kind in ("SQ8", "Flat") for one in [f"IVF{num_lists(count)},{kind}"]]
        print(f"index: the recall of {options.recall} is out of reach of {factory}, however widely it searches; it "
              f"takes a factory that keeps more of each vector: {others[0]} may, {others[1]} does", file=sys.stderr)


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
