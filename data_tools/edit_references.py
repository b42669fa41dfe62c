"""m3 data edit-references: a knowledge base with references added, replaced or deleted; ids stay what they were.

    m3 data edit-references --references R --output R2 --add new.jsonl --tokenizer tokenizer
    m3 data edit-references --references R --output R2 --replace 5,9 --by texts.jsonl --delete 3,20-40 --tokenizer ...
    m3 data edit-references --references R --output R2 --append OTHER

R is left as it is; blocks without an edit are shared with it (hard links, copies where the file system has none). An
added reference gets the next free id, a deleted one stays as a reference of no tokens, which is never retrieved. R2
says what was done since R, and `m3 bank update` does the same to a bank of R, encoding only what is new.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.documents import Corpus, show_counts
from megatron_m3.config import parse
from megatron_m3.errors import ArtifactError, ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import (
    Manifest,
    atomic_folder,
    block_name,
    check_files,
    hash_file,
    link_or_copy,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    import numpy as np

    from megatron_m3.references import Edit, ReferenceStore
    from megatron_m3.tokenizer import Tokenizer

type Row = tuple[str, Sequence[int], str, int]
"""Text, tokens, document id and first token of a reference."""
DELETED: Row = ("", (), "", 0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    references: str
    """Folder of the knowledge base, made by `m3 data references` or by this job."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    add: str = ""
    """File or folder of documents that are cut into new references."""
    replace: str = ""
    """Ids of references that get another text, such as 5,9,20-40; a deleted one is alive again."""
    by: str = ""
    """With --replace: file of as many documents, one for each id in ascending order."""
    delete: str = ""
    """Ids of references to delete."""
    delete_document: str = ""
    """Document whose references are deleted, by its id."""
    append: str = ""
    """Another knowledge base, all of whose references are added, in order; not with another edit."""
    tokenizer: str = ""
    """With --add and --replace: folder of the tokenizer that the knowledge base was made with."""

    def __post_init__(self) -> None:
        others = [name for name in ("add", "replace", "delete", "delete_document") if getattr(self, name)]
        if not (others or self.append):
            raise ConfigError("add: nothing to do; give --add, --replace, --delete, --delete-document or --append")
        if others and self.append:
            raise ConfigError(f"append: not together with {others[0]}; do one after the other")
        if bool(self.replace) != bool(self.by):
            raise ConfigError("by: --replace takes the new texts with --by, and only it does")
        if bool(self.tokenizer) != bool(self.add or self.replace):
            raise ConfigError("tokenizer: give it with --add and --replace, and only then")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What becomes of the references of a store."""

    rows: Mapping[int, Row]
    """New contents of references that are there."""
    added: Iterator[Row]
    """New references, in order."""


def run(options: Options) -> None:
    """Write the edited store, unless it is there already."""
    import numpy as np

    from megatron_m3.references import Edit, ReferenceStore, format_ids, parse_ids
    from megatron_m3.references.store import KIND, SCHEMA

    base, output = ReferenceStore.open(options.references), Path(options.output)
    other = ReferenceStore.open(options.append) if options.append else None
    corpora = {name: Corpus((text,)) for name, text in (("added", options.add), ("replaced", options.by)) if text}
    inputs = {"references": base.hash, "tokenizer": base.tokenizer_hash}
    inputs |= {name: corpus.hash for name, corpus in corpora.items()} | ({"appended": other.hash} if other else {})
    replaced, deleted = (parse_ids(text, name, len(base)) for name, text in (("replace", options.replace),
                                                                             ("delete", options.delete)))
    if options.delete_document:
        deleted = np.union1d(deleted, base.ids_of_document(options.delete_document))
    edit = Edit(base=base.hash, replaced=format_ids(replaced), deleted=format_ids(deleted),
                appended=other.hash if other else "")
    if _is_made(output, inputs, edit):
        print(f"{output}: made already")
        return
    changes = find_changes(options, base, other, corpora, replaced, deleted)
    with atomic_folder(output) as folder:
        files, length = write_blocks(folder, base, changes)
        edit = Edit(**vars(edit) | {"added": format_ids(range(len(base), length))})
        settings = base.manifest.settings | {"edits": [one.to_dict() for one in (*base.edits, edit)]}
        counts = {"references": length, "added": length - len(base), "replaced": len(replaced),
                  "deleted": len(deleted), "blocks": len(files)}
        write_manifest(folder, Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files=files,
                                        info=counts))
    show_counts("references", counts)
    print(output)


def _is_made(output: Path, inputs: dict[str, str], edit: "Edit") -> bool:
    """Whether ``output`` is the result of this very job.

    Raises:
        ArtifactError: it is something else.
    """
    from megatron_m3.references.store import KIND, SCHEMA

    if not (output / "manifest.json").exists():
        return False
    manifest = read_manifest(output, KIND, SCHEMA)
    last = dict((manifest.settings.get("edits") or [{}])[-1])
    last.pop("added", None)
    if manifest.inputs != inputs or last != edit.to_dict():
        raise ArtifactError(f"{output}: holds references made from other inputs or settings; choose another folder")
    check_files(output, manifest)
    return True


def find_changes(
    options: Options, base: "ReferenceStore", other: "ReferenceStore | None", corpora: Mapping[str, Corpus],
    replaced: "np.ndarray", deleted: "np.ndarray",
) -> Changes:
    """Read the new texts, and check that all goes together.

    Raises:
        M3Error: it does not.
    """
    from data_tools.references import find_references
    from megatron_m3.tokenizer import Tokenizer

    if both := set(replaced.tolist()) & set(deleted.tolist()):
        raise ConfigError(f"replace: reference {min(both)} is to be replaced and to be deleted; give it in one of them")
    rows: dict[int, Row] = dict.fromkeys(deleted.tolist(), DELETED)
    added: Iterator[Row] = iter(())
    if other:
        if (other.tokenizer_hash, other.reference_length) != (base.tokenizer_hash, base.reference_length):
            raise ArtifactError(f"{options.append}: has another tokenizer or reference length than "
                                f"{options.references}; make one again with those of the other")
        added = _rows(other, range(len(other)))
    if corpora:
        tokenizer = Tokenizer.load(options.tokenizer)
        if tokenizer.hash != base.tokenizer_hash:
            raise ArtifactError(f"{options.tokenizer}: not the tokenizer that {options.references} was made with; give "
                                "that one")
        if "replaced" in corpora:
            rows |= _replacements(corpora["replaced"], tokenizer, replaced.tolist(), base.reference_length)
        if "added" in corpora:
            corpora["added"].check()
            added = find_references(corpora["added"].batches("cutting references"), tokenizer, base.reference_length)
    return Changes(rows=rows, added=added)


def _replacements(corpus: Corpus, tokenizer: "Tokenizer", ids: list[int], limit: int) -> dict[int, Row]:
    """A document for each of ``ids``, whole."""
    documents = list(corpus)
    corpus.finish()
    if len(documents) != len(ids):
        raise DataError(f"by: {len(documents)} usable documents for {len(ids)} references to replace; give one each")
    rows: dict[int, Row] = {}
    encoded = tokenizer.encode_batch([document.text for document in documents])
    for id, document, tokens in zip(ids, documents, encoded, strict=True):
        if not 0 < len(tokens) <= limit:
            raise DataError(f"by: document {document.id} has {len(tokens)} tokens, a reference at most {limit}; "
                            f"shorten it, or delete reference {id} and --add the document")
        rows[id] = (document.text, tokens, document.id, 0)
    return rows


def write_blocks(folder: Path, base: "ReferenceStore", changes: Changes) -> tuple[dict[str, dict[str, object]], int]:
    """Write the blocks to ``folder``; return the files of the manifest and the number of references."""
    from megatron_m3.platform.progress import Progress
    from megatron_m3.references import arrays_of_block

    touched = {id // base.block_size for id in changes.rows}
    vocab_size = 1 << 16 if base.token_dtype.itemsize == 2 else 1 << 31
    files: dict[str, dict[str, object]] = {}
    length = 0
    with Progress("editing references", len(base), "references") as progress:
        for index in itertools.count():
            ids = range(index * base.block_size, min(len(base), (index + 1) * base.block_size))
            new = list(itertools.islice(changes.added, base.block_size - len(ids)))
            if not (new or len(ids)):
                return files, length
            name = block_name(index)
            if new or index in touched:
                rows = [changes.rows.get(id, row) for id, row in zip(ids, _rows(base, ids), strict=True)]
                _save(folder / name, arrays_of_block([*rows, *new], base.reference_length, vocab_size))
                files[name] = hash_file(folder / name)
            else:
                link_or_copy(base.folder / name, folder / name)
                files[name] = base.manifest.files[name]
            length += len(ids) + len(new)
            progress.advance(len(ids))
    raise AssertionError("the loop returns")


def _save(path: Path, arrays: Mapping[str, "np.ndarray"]) -> None:
    from safetensors.numpy import save

    path.write_bytes(save(dict(arrays)))


def _rows(store: "ReferenceStore", ids: range) -> Iterator[Row]:
    for some in itertools.batched(ids, 1024):
        tokens, lengths = store.tokens(some)
        for id, row, length in zip(some, tokens, lengths, strict=True):
            yield store.text(id), row[:length].tolist(), *store.source(id)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data edit-references``."""
    run(parse(Options, argv, "m3 data edit-references", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
