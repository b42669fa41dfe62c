"""Embedders: texts to vectors whose inner product is their likeness. An embedder is a folder with a manifest."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import Manifest, check_files, read_manifest, write_manifest

KIND, SCHEMA = "embedder", 1
type Role = Literal["query", "document"]
"""What a text is: one that asks, or a reference that is asked for; some models put other words before each."""


class Embedder(Protocol):
    """Turns texts into vectors."""

    size: int
    """Numbers in a vector."""
    hash: str
    """Hash of its manifest."""

    def embed(self, texts: Sequence[str], role: Role = "document") -> np.ndarray:
        """Vectors of ``texts``, float32 [N, size], each of length 1; of length 0 if the text has nothing to go by."""
        ...


def load_embedder(folder: str | Path) -> Embedder:
    """Open an embedder folder.

    Raises:
        ArtifactError: not an embedder folder, a damaged one, or one whose model has changed since.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, KIND, SCHEMA)
    check_files(folder, manifest, checksums=True)
    kind = manifest.settings["kind"]
    if kind == "tfidf":
        from megatron_m3.retrieval.tfidf import TfidfEmbedder

        return TfidfEmbedder(folder, manifest)
    if kind == "sentence_transformer":
        from megatron_m3.retrieval.transformer import TransformerEmbedder

        return TransformerEmbedder(manifest)
    raise ArtifactError(f"{folder}: embedder kind {kind!r} is unknown to this version; embed the references again")


def copy_embedder(source: Path, target: Path) -> Manifest:
    """Copy an embedder folder; the copy has the same hash."""
    manifest = read_manifest(source, KIND, SCHEMA)
    target.mkdir()
    for name in manifest.files:
        shutil.copyfile(source / name, target / name)
    write_manifest(target, manifest)
    return manifest


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Vectors [N, size] scaled to length 1, as float32; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros(vectors.shape, lengths.dtype), where=lengths > 0).astype(np.float32)
