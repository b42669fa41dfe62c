"""The knowledge base: references on disk, and how a text is cut into them."""

from megatron_m3.references.edits import Edit, format_ids, parse_ids
from megatron_m3.references.split import Piece, split_text
from megatron_m3.references.store import ReferenceStore, SelectedReferences, arrays_of_block

__all__ = [
    "Edit",
    "Piece",
    "ReferenceStore",
    "SelectedReferences",
    "arrays_of_block",
    "format_ids",
    "parse_ids",
    "split_text",
]
