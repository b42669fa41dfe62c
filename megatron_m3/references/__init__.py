"""The knowledge base: references on disk, and how a text is cut into them."""

from megatron_m3.references.edits import Edit, format_ids, parse_ids
from megatron_m3.references.split import Piece, split_text
from megatron_m3.references.store import ReferenceStore, SelectedReferences, arrays_of_block, pack_block, token_dtype

__all__ = [
    "Edit",
    "Piece",
    "ReferenceStore",
    "SelectedReferences",
    "arrays_of_block",
    "format_ids",
    "pack_block",
    "parse_ids",
    "split_text",
    "token_dtype",
]
