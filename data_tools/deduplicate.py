"""m3 data deduplicate: drop documents that repeat an earlier one, anywhere in the corpus, wholly or nearly.

Exact repeats are told by a hash of the words, near ones by MinHash. Any number of jobs may run the same command at
once: they share the blocks of each of the five stages, and each ends when all is done. `dropped/` names for every
document left out the one that was kept, as BLOCK:ROW of the input; `largest_groups.txt` shows the largest groups, for
people to look at.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.document_store import KIND, SCHEMA, DocumentFolder, DocumentStore, is_made, show
from data_tools.duplicates import NearPairs, Runs, exact_pairs, join
from data_tools.minhash import MinHash
from data_tools.shared_work import Do, Workers, stages
from data_tools.words import split_words
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error
from megatron_m3.manifest import BlockFolder, atomic_path, map_block

SHOWN_GROUPS, SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 30, 4, 300
STAGE_SCHEMA = 2
"""Version of the stages' blocks."""
STAGES = ("hash", "exact", "sign", "near", "group")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    input: str
    """Folder of documents, made by `m3 data collect` or `m3 data filter`."""
    output: str
    """Folder to write."""
    minhash: MinHash = field(default_factory=MinHash)
    part_entries: int = 1 << 24
    """Hashes and bands that are brought together at a time; 2^24 take about 1 GB in each worker."""
    workers: int = 1
    """Processes here; more jobs of the same command, on any machine, share the blocks too."""

    def __post_init__(self) -> None:
        for name in ("part_entries", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


def run(options: Options) -> None:
    """Do what is missing of the stages and of the output, then write the manifest."""
    store, output = DocumentStore.open(options.input), Path(options.output)
    inputs = {"documents": store.hash}
    settings = {"step": "deduplicate", "minhash": asdict(options.minhash), "part_entries": options.part_entries}
    if is_made(output, inputs, settings):
        return
    with stages(output / "stages", lambda: is_made(output, inputs, settings)):
        deduplicate(store, output, options, inputs, settings)


def deduplicate(
    store: DocumentStore, output: Path, options: Options, inputs: dict[str, str], settings: dict[str, Any]
) -> None:
    """All stages, the output, its manifest."""
    job = {"kind": KIND, "schema": SCHEMA, "inputs": inputs, "settings": settings}
    folder = DocumentFolder(output, job)
    work = Deduplication(store, folder, job, options)
    with Workers(options.workers) as workers:
        for stage in STAGES:
            by_documents = stage in ("hash", "sign")
            sizes = store.sizes if by_documents else [1] * work.num_parts[stage]
            do: Do = getattr(work, stage)
            workers.run(f"duplicates, {stage}", work.stages[stage], sizes, "documents" if by_documents else "parts", do)
        workers.run("duplicates, write", folder, store.sizes, "documents", work.write)
    show("deduplicated", output, folder.finish(len(store.sizes), inputs, settings))


class Deduplication:
    """The stages; each method named after one writes the block of a number."""

    def __init__(self, store: DocumentStore, output: DocumentFolder, job: dict[str, Any], options: Options) -> None:
        self.store, self.output, self.minhash = store, output, options.minhash
        self.first_documents = np.cumsum([0, *store.sizes])[:-1]
        documents = sum(store.sizes)
        self.num_parts = {
            "exact": max(1, -(-documents // options.part_entries)),
            "near": max(1, -(-documents * self.minhash.bands // options.part_entries)),
            "group": 1,
        }
        self.folder = output.folder / "stages"
        job = job | {"schema": STAGE_SCHEMA}
        self.stages = {name: BlockFolder(self.folder / name, job | {"kind": f"documents, {name}"}) for name in STAGES}
        self.runs = {stage: Runs(self.stages[stage], len(store.sizes), self.num_parts[parts])
                     for stage, parts in (("hash", "exact"), ("sign", "near"))}

    def _pairs(self, stage: str) -> Iterator[dict[str, np.ndarray]]:
        """Documents that repeat and those that they repeat, as a stage found them, part by part."""
        for part in range(self.num_parts[stage]):
            yield map_block(self.stages[stage].checked(part))

    def hash(self, index: int) -> None:
        """128-bit hashes of the words of a block's documents, sorted."""
        digests = []
        for batch in self.store.batches(index):
            texts = batch.column("text").to_pylist()
            spelt = [words.spelt(text) for words in split_words(texts) for text in range(len(words.letters))]
            digests += [hashlib.blake2b(told_by or text.encode(), digest_size=16).digest()
                        for told_by, text in zip(spelt, texts, strict=True)]
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        order = np.argsort(halves[:, 0], kind="stable")
        key, rest = halves[order].T
        self.runs["hash"].write(index, {"key": key, "rest": rest, "row": order.astype(np.uint32)})

    def exact(self, index: int) -> None:
        """Exact repeats, of a part of the hashes."""
        pairs = exact_pairs(self.runs["hash"], self.first_documents, index)
        self.stages["exact"].write(index, {"document": pairs[:, 0], "first": pairs[:, 1]})

    def _repeats(self, stage: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a block that a stage found to repeat, in order, and the number of the document that each repeats."""
        first, last = self.first_documents[index], self.first_documents[index] + self.store.sizes[index]
        found = [(run["document"][here] - first, run["first"][here].copy())
                 for run in self._pairs(stage)
                 for here in [slice(*np.searchsorted(run["document"], (first, last)))]]
        rows, firsts = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(rows)
        return rows[order], firsts[order]

    def sign(self, index: int) -> None:
        """Signatures of a block's documents that are no exact repeats, and the keys of their bands, sorted."""
        import pyarrow

        new = np.ones(self.store.sizes[index], bool)
        new[self._repeats("exact", index)[0]] = False
        found, start = [(np.zeros(0, np.uint32), np.zeros((0, self.minhash.num_perm), np.uint32))], 0
        for batch in self.store.batches(index):
            rows = np.flatnonzero(new[start : start + len(batch)])
            for words in split_words(batch.column("text").take(pyarrow.array(rows)).to_pylist()):
                worded = np.flatnonzero(words.counts)
                found.append(((start + rows[worded]).astype(np.uint32), self.minhash.sign(words)[worded]))
                rows = rows[len(words.letters) :]
            start += len(batch)
        signed, values = (np.concatenate(column) for column in zip(*found, strict=True))
        keys = self.minhash.band_keys(values).reshape(-1)
        order = np.argsort(keys, kind="stable")
        run = {"key": keys[order], "row": np.repeat(signed, self.minhash.bands)[order]}
        self.runs["sign"].write(index, run, rows=signed, signatures=values)

    def near(self, index: int) -> None:
        """Near repeats, of a part of the keys."""
        pairs = NearPairs(self.runs["sign"], self.first_documents, self.minhash).find(index)
        self.stages["near"].write(index, {"document": pairs[:, 0], "first": pairs[:, 1]})

    def group(self, index: int) -> None:
        """Groups of documents that are the same, wholly or nearly, and the largest of them as text."""
        found = (pairs for stage in ("exact", "near") for pairs in self._pairs(stage))
        groups = join(np.stack([pairs["document"], pairs["first"]], axis=1) for pairs in found)
        firsts, counts = np.unique(groups[:, 1], return_counts=True)
        largest = np.argsort(-counts, kind="stable")[:SHOWN_GROUPS]
        lines = []
        for first, count in zip(firsts[largest], counts[largest], strict=True):
            members = groups[groups[:, 1] == first][: SHOWN_DOCUMENTS - 1, 0]
            lines += [f"{count + 1:,} documents", *map(self._describe, [first, *members]), ""]
        with atomic_path(self.output.folder / "largest_groups.txt") as path:
            path.write_text("\n".join(lines), encoding="utf-8")
        self.stages["group"].write(index, {"document": groups[:, 0], "first": groups[:, 1]})

    def _place(self, document: int) -> tuple[int, int]:
        """Block and row of a document."""
        block = int(np.searchsorted(self.first_documents, document, side="right")) - 1
        return block, int(document - self.first_documents[block])

    def _describe(self, document: int) -> str:
        """Place, id and beginning of a document, as a line."""
        block, row = self._place(document)
        found = self.store.row(block, row)
        return f"  {found['place']}  {found['id']}  {' '.join(found['text'][:SHOWN_CHARACTERS].split())}"

    def write(self, index: int) -> None:
        """The documents of a block that are kept."""
        import pyarrow

        exact = set(self._repeats("exact", index)[0].tolist())
        rows, firsts = self._repeats("group", index)
        kept_instead = dict(zip(rows.tolist(), firsts.tolist(), strict=True))
        with self.output.block(index, self.store.columns()) as writer:
            start = 0
            for batch in self.store.batches(index):
                repeats = [row for row in range(start, start + len(batch)) if row in kept_instead]
                ids, places = batch.column("id"), batch.column("place")
                for row in repeats:
                    block, kept_row = self._place(kept_instead[row])
                    writer.drop("repeats exactly" if row in exact else "repeats nearly", id=ids[row - start].as_py(),
                                place=places[row - start].as_py(), kept=f"{self.store.name(block)}:{kept_row}")
                mask = np.ones(len(batch), bool)
                mask[np.array(repeats, int) - start] = False
                writer.write(batch.filter(pyarrow.array(mask)))
                start += len(batch)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data deduplicate``."""
    run(parse(Options, argv, "m3 data deduplicate", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
