"""The memory bank as transformers' models read it, and the retriever over its references.

Legend of shape suffixes: N references or chunks, G kv heads, D head size, L memory layers, X key or value, K kept
tokens, M memory slots, B bytes, C lists, A bits of a code, E key and value together. A list is what one head of one
layer holds; lists are by head, then by layer.
"""

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

SCHEMAS = {"bank": 2, "codec": 3}
STATE_BITS = 9
"""Bits of a joint code that a number depends on."""
BANK_SETTINGS = {"num_references", "block_size", "memory_layers", "num_kept_tokens", "selection", "spread", "prefix",
                 "reference_length", "num_kv_heads", "head_size", "codec", "token_bytes"}
SHARD = re.compile(r"(?:folded_[0-9a-f]+/)?shard_(\d+)\.bin")
RARE_SETTINGS = frozenset({"memory_heads", "scales"})
"""Of banks in which not all heads hold memory, and of the codec fp8."""
CODEC_SETTINGS = {"separate": {"kind", "name", "head_size", "dtype", "shared"},
                  "joint": {"kind", "name", "head_size", "num_heads"}}
NEWER = "this modelling file does not know it; export the model again with a newer `m3 convert to-hf --memory`"

Decode = Callable[[np.ndarray, Tensor, int], Tensor]
"""Codes uint8 [C, B], positions int16 [C, K] and how many of K tokens are kept, to float32 [C, X, kept, D]."""
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
        manifest = _read_manifest(self.folder, "bank")
        if "edits" in manifest["settings"]:
            raise BankError(f"{self.folder}: was edited; fold the edits in with `m3 bank compact`, then open it")
        _check_settings(self.folder, manifest, BANK_SETTINGS)
        self.shards = {int(match[1]): name for name in manifest["files"] if (match := SHARD.fullmatch(name))}
        for role in ("checkpoint", "tokenizer"):
            _check_input(self.folder, manifest, role, memory["hashes"][role])
        self.references_hash, self.settings = manifest["inputs"]["references"], manifest["settings"]
        for name in ("prefix", "reference_length"):
            if self.settings[name] != memory[name]:
                raise BankError(f"{self.folder}: written with {name} {self.settings[name]!r}, the model has "
                                f"{memory[name]!r}; build the bank again")
        self.layers: list[int] = self.settings["memory_layers"]
        self.held_LG = self._held_lists()
        self.decode = _open_codec(self.folder / "codec", manifest, self.held_LG)

    def _held_lists(self) -> Tensor:
        """Which heads hold memory in which of the bank's layers."""
        held_LG = torch.ones(len(self.layers), self.settings["num_kv_heads"], dtype=torch.bool)
        if "memory_heads" in self.settings:
            parts = dict(part.split(":") for part in self.settings["memory_heads"].split(";"))
            for place, layer in enumerate(self.layers):
                heads = set(parts[str(layer)].split(","))
                held_LG[place] = torch.tensor([str(head) in heads for head in range(held_LG.shape[1])])
        return held_LG

    def fetch(self, ids: Sequence[int]) -> Tensor:
        """Keys (rotated) and values of the kept tokens of some references, one after another, [L, X, G, M, D]."""
        shape = (len(self.layers), 2, self.settings["num_kv_heads"], 0, self.settings["head_size"])
        return torch.cat([torch.zeros(shape), *map(self._read, ids)], 3)

    def _read(self, id: int) -> Tensor:
        """Float32 [L, X, G, kept, D] of one record: codes [C, B], positions [C, K], num_kept, sums by head."""
        C, G, K = int(self.held_LG.sum()), self.settings["num_kv_heads"], self.settings["num_kept_tokens"]
        in_shard = self.settings["block_size"]
        if not 0 <= id < self.settings["num_references"]:
            raise BankError(f"{self.folder}: reference {id} is not in 0-{self.settings['num_references'] - 1}")
        sizes = [C * K * self.settings["token_bytes"], C * 2 * K, 4, 4 * G]
        path = self.folder / self.shards[id // in_shard]
        with path.open("rb") as stream:
            stream.seek(id % in_shard * sum(sizes))
            parts = np.split(np.fromfile(stream, np.uint8, sum(sizes)), np.cumsum(sizes))
        codes, positions, num_kept = parts[0].reshape(C, -1), parts[1].reshape(C, -1), parts[2]
        ends = itertools.pairwise([0, *self.held_LG.sum(0).cumsum(0).tolist()])
        sums = [zlib.crc32(num_kept, zlib.crc32(positions[lists], zlib.crc32(codes[lists])))
                for lists in itertools.starmap(slice, ends)]
        if parts[3].tobytes() != np.array(sums, "<u4").tobytes():
            raise BankError(f"{path}: the record of reference {id} is damaged; build the bank again")
        positions_CK = torch.from_numpy(positions.copy().view("<i2").astype(np.int16))
        kept = int.from_bytes(num_kept.tobytes(), "little")
        kv_CXMD = self.decode(codes, positions_CK, kept) if kept else torch.zeros(C, 2, 0, self.settings["head_size"])
        kv_GLXMD = kv_CXMD.new_zeros(*self.held_LG.T.shape, *kv_CXMD.shape[1:])
        kv_GLXMD[self.held_LG.T] = kv_CXMD
        return kv_GLXMD.permute(1, 2, 0, 3, 4)


def _read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a bank or codec; the sizes of its files are checked."""
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
    if schema != SCHEMAS[kind]:
        raise BankError(f"{folder}: {kind} schema {schema}, not {SCHEMAS[kind]}: {NEWER}")
    if digest != recorded:
        raise BankError(f"{path}: changed after it was written; build the bank again")
    for name, file in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != file["bytes"]:
            raise BankError(f"{folder / name}: missing or cut short; build the bank again")
    return manifest | {"hash": digest}


def _check_settings(folder: Path, manifest: dict[str, Any], known: set[str]) -> None:
    for name in sorted(known ^ (set(manifest["settings"]) - RARE_SETTINGS)):
        raise BankError(f"{folder}: {manifest['kind']} setting {name}: {NEWER}")


def _check_input(folder: Path, manifest: dict[str, Any], role: str, actual: str) -> None:
    recorded = manifest["inputs"].get(role, "none")
    if recorded != actual:
        raise BankError(f"{folder}: made from another {role} ({recorded[:12]}, this model's is {actual[:12]}); give "
                        "the bank of this model")


def _open_codec(folder: Path, bank: dict[str, Any], held_LG: Tensor) -> Decode:
    manifest = _read_manifest(folder, "codec")
    _check_input(folder.parent, bank, "codec", manifest["hash"])
    settings, files = manifest["settings"], {}
    kind = settings.get("kind")
    if kind not in CODEC_SETTINGS:
        raise BankError(f"{folder}: codec kind {kind}: {NEWER}")
    _check_settings(folder, manifest, CODEC_SETTINGS[kind])
    for name, file in sorted(manifest["files"].items()):
        files[name] = (folder / name).read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != file["sha256"]:
            raise BankError(f"{folder / name}: checksum differs from the manifest; build the bank again")
    if kind == "joint":
        return JointCodec(files["keys_and_values.safetensors"], settings, held_LG).decode
    if settings["name"] == "fp8":
        return SeparateCodec([_number_decoder(torch.float8_e4m3fn, scale) for scale in settings["scales"]]).decode
    if settings["name"] != "none":
        return SeparateCodec([_faiss_decoder(folder, data) for data in files.values()]).decode
    return SeparateCodec([_number_decoder({"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]])]).decode


def _number_decoder(dtype: torch.dtype, scale: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda codes_KB: (torch.from_numpy(codes_KB).view(dtype).float() * scale).numpy()


def _faiss_decoder(folder: Path, data: bytes) -> Callable[[np.ndarray], np.ndarray]:
    try:
        import faiss
    except ImportError:
        raise ImportError(f"{folder.parent}: compressed with FAISS; install faiss-cpu to read it") from None
    return faiss.deserialize_index(np.frombuffer(data, np.uint8)).sa_decode


class SeparateCodec:
    """Codes of keys, then codes of values: numbers, or FAISS codes."""

    def __init__(self, decoders: list[Callable[[np.ndarray], np.ndarray]]) -> None:
        """One decoder for both or one for each: uint8 [K, B] to float32 [K, D]."""
        self.decoders = (decoders[0], decoders[-1])

    def decode(self, codes_CB: np.ndarray, positions_CK: Tensor, kept: int) -> Tensor:
        """See :data:`Decode`."""
        codes_CXKB = codes_CB.reshape(len(codes_CB), 2, positions_CK.shape[1], -1)[:, :, :kept]
        parts = [decode(np.ascontiguousarray(codes_CXKB[:, part]).reshape(-1, codes_CXKB.shape[-1]))
                 for part, decode in enumerate(self.decoders)]
        return torch.from_numpy(np.stack([part.reshape(len(codes_CB), kept, -1) for part in parts], 1))


class JointCodec:
    """Codes of a slot's tokens in all layers of a head: a transform for each list, keys turned back to position 0."""

    def __init__(self, data: bytes, settings: dict[str, Any], held_LG: Tensor) -> None:
        """The file has the transforms by layer, then by head."""
        tensors = load(data)
        number_LG = held_LG.flatten().cumsum(0).view(held_LG.shape) - 1
        order_C = number_LG.T[held_LG.T]
        self.mean_CE, self.from_CEE, self.bits_CE = (
            tensors[name][order_C] for name in ("mean_CD", "from_CDD", "bits_CD")
        )
        self.head_C, self.tables, self.frequency = tensors["group_C"][order_C], tensors["tables"], tensors["frequency"]
        self.head_size: int = settings["head_size"]

    def decode(self, codes_CB: np.ndarray, positions_CK: Tensor, kept: int) -> Tensor:
        """See :data:`Decode`."""
        C, K = positions_CK.shape
        numbers = [self._numbers(codes_CB[head_C].reshape(K, -1)[:kept], self.bits_CE[head_C])
                   for head_C in (self.head_C == head for head in self.head_C.unique())]
        vectors_CKE = torch.cat(numbers) @ self.from_CEE + self.mean_CE[:, None]
        key_CKD, value_CKD = vectors_CKE.view(C, kept, 2, self.head_size).unbind(2)
        angle = positions_CK[:, :kept, None].double() * self.frequency
        cosine, sine = angle.cos().float(), angle.sin().float()
        first, second = key_CKD.chunk(2, -1)
        turned_CKD = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
        return torch.stack([turned_CKD, value_CKD], 1)

    def _numbers(self, codes_KB: np.ndarray, bits_CE: Tensor) -> Tensor:
        """What the codes of a head stand for before its transforms, [C, K, E]; most bits come first in a code."""
        bits, order = bits_CE.flatten().long().sort(descending=True, stable=True)
        ends = bits.cumsum(0)[order.argsort()]
        before = np.zeros((len(codes_KB), STATE_BITS), np.uint8)
        stream = torch.from_numpy(np.concatenate([before, np.unpackbits(codes_KB, axis=-1)], 1)).long()
        last = torch.arange(STATE_BITS)
        state = (stream[:, ends[:, None] + last] << last.flip(0)).sum(-1)
        numbers = self.tables[bits_CE.flatten().long(), state]
        return numbers.view(len(codes_KB), *bits_CE.shape).transpose(0, 1)


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
