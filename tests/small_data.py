"""A small but real corpus for tests: tokenizer, tokens, references and neighbours in one folder, made in a second."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_tools import references, tokenize, wordnet
from megatron_m3.config import Config, get_recipe
from megatron_m3.data import TokenStore
from megatron_m3.manifest import BlockFolder, Manifest, write_manifest
from megatron_m3.references import ReferenceStore
from megatron_m3.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE, REFERENCE_LENGTH, CHUNK_LENGTH = 512, 16, 8


@dataclass(frozen=True)
class SmallData:
    """Folders of the artifacts."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def references(self) -> Path:
        return self.folder / "references"

    @property
    def neighbours(self) -> Path:
        return self.folder / "neighbours"

    def config(self, **training: object) -> Config:
        """The tiny recipe on this data; ``training`` replaces fields of that section."""
        config = get_recipe("tiny")
        folders = {name: str(self.folder / name) for name in ("tokenizer", "tokens", "references", "neighbours")}
        return replace(config, data=replace(config.data, **folders), training=replace(config.training, **training))


def make_small_data(folder: Path, entries: int = 60) -> SmallData:
    """Glosses of ``entries`` WordNet entries, a few to a document, and random neighbours, some of them missing."""
    data = SmallData(folder)
    chosen = wordnet.load_entries(wordnet.CORPUS, 160)[500 : 500 + entries]
    documents = [{"id": group[0].id, "text": " ".join(f"{entry.opening} {entry.gloss}." for entry in group)}
                 for group in (chosen[first : first + 3] for first in range(0, entries, 3))]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(document) + "\n" for document in documents))
    train_tokenizer([document["text"] for document in documents], VOCAB_SIZE, data.tokenizer)
    common = ["--input", str(corpus), "--tokenizer", str(data.tokenizer)]
    tokenize.main([*common, "--output", str(data.tokens)])
    references.main([*common, "--output", str(data.references), "--reference-length", str(REFERENCE_LENGTH),
                     "--block-size", "32"])
    tokens, store = TokenStore.open(data.tokens), ReferenceStore.open(data.references)
    write_neighbours(data.neighbours, tokens, store, Tokenizer.load(data.tokenizer).hash)
    return data


def write_neighbours(folder: Path, tokens: TokenStore, references: ReferenceStore, tokenizer_hash: str,
                     seed: int = 0, num_neighbours: int = 3, documents_per_block: int = 8,
                     chunk_length: int = CHUNK_LENGTH) -> None:
    """Random neighbours of every chunk, a fifth of them missing."""
    draw = np.random.default_rng(seed)
    counts = np.diff(tokens.first_chunks(chunk_length))
    inputs = {"tokens": tokens.hash, "references": references.hash, "tokenizer": tokenizer_hash}
    settings = {"chunk_length": chunk_length, "documents_per_block": documents_per_block}
    blocks = BlockFolder(folder, {"inputs": inputs, "settings": settings})
    num_blocks = -(-len(counts) // documents_per_block)
    for index in range(num_blocks):
        offsets = np.cumsum([0, *counts[index * documents_per_block : (index + 1) * documents_per_block]])
        shape = (offsets[-1], num_neighbours)
        blocks.write(index, {"chunk_offsets": offsets.astype(np.int64),
                             "ids": draw.integers(len(references), size=shape), "valid": draw.random(shape) < 0.8,
                             "scores": draw.random(shape, np.float32), "overlaps": draw.random(shape, np.float32)})
    write_manifest(folder, Manifest(kind="neighbours", schema=1, inputs=inputs, settings=settings,
                                    files=blocks.files(num_blocks)))
