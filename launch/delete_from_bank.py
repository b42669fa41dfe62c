"""`m3 bank delete`: make memories empty at once, without the model; the references keep their ids.

    m3 bank delete --bank bank --ids 3,7,20-40
    m3 bank delete --bank bank --document wiki/Mercury --references references

An index that still finds such a reference does no harm: nothing is read for it. To take it out of the knowledge base
too, `m3 data edit-references --delete`, then `m3 bank update`. `m3 bank compact` removes the bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class DeleteOptions:
    """Which bank, and which references."""

    bank: str
    """Folder of the bank."""
    ids: str = ""
    """Ids of references, such as 3,7,20-40; this or --document."""
    document: str = ""
    """Id of a document, all of whose references are deleted; this or --ids."""
    references: str = ""
    """With --document: folder of the bank's knowledge base."""

    def __post_init__(self) -> None:
        if bool(self.ids) == bool(self.document):
            raise ConfigError("ids: give either --ids or --document")
        if bool(self.document) != bool(self.references):
            raise ConfigError("references: give it with --document, and only then")


def main(argv: Sequence[str] | None = None) -> None:
    """Delete memories, and say how many."""
    options = parse(DeleteOptions, argv, "m3 bank delete", __doc__ or "")
    from pathlib import Path

    from megatron_m3.platform import select

    select()
    from megatron_m3.manifest import check_input, read_manifest
    from megatron_m3.memory.bank import KIND, SCHEMA, BankSettings
    from megatron_m3.memory.editing import delete_references
    from megatron_m3.references import ReferenceStore, parse_ids

    folder = Path(options.bank)
    manifest = read_manifest(folder, KIND, SCHEMA)
    if options.document:
        references = ReferenceStore.open(options.references)
        check_input(folder, manifest, "references", references.hash)
        ids = references.ids_of_document(options.document)
    else:
        ids = parse_ids(options.ids, below=BankSettings.from_dict(manifest.settings).num_references)
    print(delete_references(options.bank, ids))


if __name__ == "__main__":
    exit_on_user_error(main)
