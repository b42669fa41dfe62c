"""The memory bank as transformers' models read it, and the retriever over its references.

Legend of shape suffixes: N references or chunks, G kv heads, D head size, L memory layers, X key or value, K kept
tokens, M memory slots, B bytes of one key or value.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCHEMA = 1
"""Of banks and codecs."""
BANK_SETTINGS = {"num_references", "block_size", "memory_layers", "num_kept_tokens", "selection", "prefix",
                 "reference_length", "num_kv_heads", "head_size", "codec", "code_bytes"}
CODEC_SETTINGS = {"name", "head_size", "dtype", "shared"}
NEWER = "this modelling file does not know it; export the model again with a newer `m3 convert to-hf --memory`"

Retrieve = Callable[[Sequence[Sequence[int]], int], tuple[Any, Any, Any]]
"""Token ids of N chunks and the number k of references for each, to ids, scores and validity, [N, k] each."""


class BankError(ValueError):
    """A memory bank that cannot be read, is damaged, or was written by another model."""


class Bank:
    """Reads the memories of references by id; every record is checked against its checksums."""

    def __init__(self, folder: str | Path, memory: dict[str, Any]) -> None:
        """Open the bank of the model that ``memory``, an entry of its config, describes.

        Raises:
            BankError: not a bank, a damaged one, or one of another model.
        """
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder, "bank", BANK_SETTINGS)
        for role in ("checkpoint", "tokenizer"):
            _check_input(self.folder, manifest, role, memory["hashes"][role])
        self.references_hash, self.settings = manifest["inputs"]["references"], manifest["settings"]
        for name in ("prefix", "reference_length"):
            if self.settings[name] != memory[name]:
                raise BankError(f"{self.folder}: written with {name} {self.settings[name]!r}, the model has "
                                f"{memory[name]!r}; build the bank again")
        self.layers: list[int] = self.settings["memory_layers"]
        self.decoders = _open_codec(self.folder / "codec", manifest)

    def fetch(self, ids: Sequence[int]) -> Tensor:
        """Keys (rotated) and values of the kept tokens of some references, one after another, [L, X, G, M, D]."""
        shape = (len(self.layers), 2, self.settings["num_kv_heads"], 0, self.settings["head_size"])
        return torch.cat([torch.zeros(shape), *map(self._read, ids)], 3)

    def _read(self, id: int) -> Tensor:
        """Float32 [L, X, G, kept, D] of one record: codes [G, L, X, K, B], positions, num_kept, sums by head."""
        G, L, K = self.settings["num_kv_heads"], len(self.layers), self.settings["num_kept_tokens"]
        B, in_shard = self.settings["code_bytes"], self.settings["block_size"]
        if not 0 <= id < self.settings["num_references"]:
            raise BankError(f"{self.folder}: reference {id} is not in 0-{self.settings['num_references'] - 1}")
        sizes = [G * L * 2 * K * B, G * 2 * L * K, 4, 4 * G]
        path = self.folder / f"shard_{id // in_shard:06d}.bin"
        with path.open("rb") as stream:
            stream.seek(id % in_shard * sum(sizes))
            data = np.fromfile(stream, np.uint8, sum(sizes))
        parts = np.split(data, np.cumsum(sizes))
        codes, places, num_kept = parts[0].reshape(G, -1), parts[1].reshape(G, -1), parts[2]
        sums = [zlib.crc32(num_kept, zlib.crc32(places[head], zlib.crc32(codes[head]))) for head in range(G)]
        if parts[3].tobytes() != np.array(sums, "<u4").tobytes():
            raise BankError(f"{path}: the record of reference {id} is damaged; build the bank again")
        kept = int.from_bytes(num_kept.tobytes(), "little")
        codes_GLXKB = codes.reshape(G, L, 2, K, B)[:, :, :, :kept]
        decoded = [decode(np.ascontiguousarray(codes_GLXKB[:, :, part]).reshape(-1, B)).reshape(G, L, kept, -1)
                   for part, decode in enumerate(self.decoders)]
        return torch.from_numpy(np.stack(decoded)).permute(2, 0, 1, 3, 4)


def _read_manifest(folder: Path, kind: str, known: set[str]) -> dict[str, Any]:
    """The manifest of a bank or codec whose settings are ``known``; the sizes of its files are checked."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        found, schema, recorded = manifest["kind"], manifest["schema"], manifest.pop("hash")
        said = {name: value for name, value in manifest.items() if name != "info"}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BankError(f"{path}: missing or not readable; give a finished {kind}") from None
    if found != kind:
        raise BankError(f"{folder}: is of kind {found}, not {kind}")
    if schema != SCHEMA:
        raise BankError(f"{folder}: {kind} schema {schema}: {NEWER}")
    if digest != recorded:
        raise BankError(f"{path}: changed after it was written; build the bank again")
    for name in sorted(known ^ set(manifest["settings"])):
        raise BankError(f"{folder}: {kind} setting {name}: {NEWER}")
    for name, file in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != file["bytes"]:
            raise BankError(f"{folder / name}: missing or cut short; build the bank again")
    return manifest | {"hash": digest}


def _check_input(folder: Path, manifest: dict[str, Any], role: str, actual: str) -> None:
    recorded = manifest["inputs"].get(role, "none")
    if recorded != actual:
        raise BankError(f"{folder}: made from another {role} ({recorded[:12]}, this model's is {actual[:12]}); give "
                        "the bank of this model")


def _open_codec(folder: Path, bank: dict[str, Any]) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Decoders of keys and of values: codes uint8 [N, B] to float32 [N, D]."""
    manifest = _read_manifest(folder, "codec", CODEC_SETTINGS)
    _check_input(folder.parent, bank, "codec", manifest["hash"])
    if manifest["settings"]["name"] == "none":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[manifest["settings"]["dtype"]]
        return [lambda codes: torch.from_numpy(codes).view(dtype).float().numpy()] * 2
    try:
        import faiss
    except ImportError:
        raise ImportError(f"{folder.parent}: the bank is compressed; install faiss-cpu to read it") from None
    indexes = []
    for name, file in sorted(manifest["files"].items()):
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise BankError(f"{folder / name}: checksum differs from the manifest; build the bank again")
        indexes.append(faiss.deserialize_index(np.frombuffer(data, np.uint8)))
    return [indexes[0].sa_decode, indexes[-1].sa_decode]


class Tokens:
    """The tokenizer as megatron_m3's retriever uses it: from token ids to text."""

    def __init__(self, file: str, hash: str) -> None:
        from tokenizers import Tokenizer

        self.backend, self.hash = Tokenizer.from_file(file), hash

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self.backend.decode([int(id) for id in ids], skip_special_tokens=True))


def open_retriever(bank: Bank, index: str | Path, references: str | Path, tokens: Any) -> Retrieve:
    """The retriever of the package megatron_m3 over the references that ``bank`` was made from."""
    try:
        from megatron_m3.retrieval import Retriever
    except ImportError as error:
        raise ImportError(f"index and references need the package megatron_m3 ({error}); install it, or give "
                          "open_bank a retriever of your own") from None
    retriever = Retriever.open(index, references, tokens)
    if retriever.references.hash != bank.references_hash:
        raise BankError(f"{bank.folder}: made from other references than {references}; give those it was made from")

    def retrieve(chunks: Sequence[Sequence[int]], k: int) -> tuple[Any, Any, Any]:
        found = retriever.retrieve(chunks, k)
        return found.ids, found.scores, found.valid

    return retrieve
