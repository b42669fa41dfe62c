"""The knowledge base: references on disk, and how a text is cut into them."""

from megatron_m3.references.split import Piece, split_text
from megatron_m3.references.store import ReferenceStore, arrays_of_block

__all__ = ["Piece", "ReferenceStore", "arrays_of_block", "split_text"]
