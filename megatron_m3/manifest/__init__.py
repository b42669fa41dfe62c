"""Artifacts on disk: manifests, checksums, atomic writes, resumable block files."""

from megatron_m3.manifest.blocks import BlockFolder, BlockReader, block_name, map_block
from megatron_m3.manifest.manifest import (
    Manifest,
    atomic_folder,
    atomic_path,
    check_files,
    check_input,
    clear_half_written,
    hash_file,
    hash_json,
    is_finished,
    link_or_copy,
    read_manifest,
    tell_kept,
    write_manifest,
)

__all__ = [
    "BlockFolder",
    "BlockReader",
    "Manifest",
    "atomic_folder",
    "atomic_path",
    "block_name",
    "check_files",
    "check_input",
    "clear_half_written",
    "hash_file",
    "hash_json",
    "is_finished",
    "link_or_copy",
    "map_block",
    "read_manifest",
    "tell_kept",
    "write_manifest",
]
