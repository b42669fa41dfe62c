"""Cold start: records that the model writes when they are first asked for, as those of a bank that was never built."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_m3.errors import ArtifactError
from megatron_m3.manifest import check_input, hash_json, read_manifest
from megatron_m3.memory.bank import BankSettings, shard_name
from megatron_m3.memory.codec import KIND, SCHEMA, Codec, SeparateCodec
from megatron_m3.memory.codecs import load_codec
from megatron_m3.memory.encode import start_encoding
from megatron_m3.memory.mirror import BYTES, Mirror
from megatron_m3.memory.reader import Wanted
from megatron_m3.memory.types import ExplicitMemories, held_lists
from megatron_m3.model.checkpoint import LoadedModel

if TYPE_CHECKING:
    from megatron_m3.references import ReferenceStore

BLOCK_SIZE = 4096
"""References in a file of a local folder."""


class ColdMemories:
    """The memories of a knowledge base, written by the model, through a codec, as a bank's records.

    Last bits may depend on which references are encoded together, as in a bank; those of the same platform and group
    are the same.
    """

    is_collective = True

    def __init__(
        self, loaded: LoadedModel, references: "ReferenceStore", *, codec: Codec | None = None, codec_hash: str = "",
    ) -> None:
        """``codec`` is that of a bank of this model, whose hash is ``codec_hash``; without it numbers stay as they are
        in the model's type."""
        config = loaded.config
        held_LG = held_lists(config.memory_heads, config.model.num_kv_heads)
        self.loaded, self.references = loaded, references
        self.codec = codec or SeparateCodec.none(config.model.head_size, config.training.dtype, held_LG)
        self.decode_on(loaded.device)
        self.settings = BankSettings.of(config, num_references=len(references), block_size=BLOCK_SIZE,
                                        codec=self.codec.name, token_bytes=self.codec.token_bytes)
        self.record = self.settings.record
        inputs = {"checkpoint": loaded.weights_hash, "tokenizer": loaded.tokenizer.hash, "references": references.hash,
                  "codec": codec_hash}
        self.hash = hash_json({"inputs": inputs, "settings": self.settings.to_dict()})
        self.mirror: Mirror | None = None

    @classmethod
    def open(cls, loaded: LoadedModel, references: "ReferenceStore", codec_folder: str = "") -> Self:
        """With the codec in a bank's ``codec`` folder, if one is given.

        Raises:
            ArtifactError: no codec, a damaged one, or one that was trained for another model.
        """
        if not codec_folder:
            return cls(loaded, references)
        check_input(codec_folder, read_manifest(Path(codec_folder), KIND, SCHEMA), "checkpoint", loaded.weights_hash)
        held_LG = held_lists(loaded.config.memory_heads, loaded.config.model.num_kv_heads)
        codec, codec_hash = load_codec(Path(codec_folder), held_LG)
        memory, model = loaded.config.memory, loaded.config.model
        nothing = ExplicitMemories.empty(len(held_LG), model.num_kv_heads, memory.num_kept_tokens, model.head_size)
        try:
            codec.encode(nothing)
        except (RuntimeError, ValueError, IndexError):
            raise ArtifactError(f"{codec_folder}: trained for other memory layers or heads than the checkpoint's; give "
                                "the codec of a bank that has them") from None
        return cls(loaded, references, codec=codec, codec_hash=codec_hash)

    def __len__(self) -> int:
        return len(self.references)

    def keep_in(self, folder: Path, budget_bytes: int = BYTES) -> None:
        """Keep what is written in a local folder, where the next process finds it."""
        self.mirror = Mirror(folder, self.hash, budget_bytes)

    def rows(self, ids: np.ndarray, kv_heads: slice = slice(None)) -> np.ndarray:
        """The records of distinct ``ids``, as :meth:`MemoryBank.rows` gives them; what is missing is written."""
        layout, pieces = self.record.part(kv_heads)
        rows = np.zeros((len(ids), layout.record_bytes), np.uint8)
        places = [(shard_name(id // BLOCK_SIZE), id % BLOCK_SIZE * self.record.record_bytes) for id in ids.tolist()]
        wanted = Wanted(places=places, layout=layout, pieces=pieces)
        missing = list(range(len(ids))) if self.mirror is None else self.mirror.read(wanted, rows)
        together = _union(ids[missing])
        if len(together):
            records = self._write(together)[np.searchsorted(together, ids[missing])]
            rows[missing] = np.concatenate([records[:, piece] for piece in pieces], 1)
            if self.mirror is not None:
                self.mirror.write(wanted.some(missing), rows[missing])
        return rows

    def decode_on(self, device: torch.device | str) -> None:
        """Have memories become codes, and codes numbers, on ``device``; until then on the model's."""
        self.codec = self.codec.to(device)

    def decode(
        self, rows: np.ndarray, kv_heads: slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> ExplicitMemories:
        """The memories in ``rows``, as :meth:`rows` gives them, where :meth:`decode_on` says."""
        codes_NCB, positions, num_kept = self.record.part(kv_heads)[0].unpack(rows)
        kv = self.codec.decode(codes_NCB, positions, num_kept, kv_heads, dtype)
        return ExplicitMemories(kv=kv, positions=positions, num_kept=num_kept)

    def _write(self, ids: np.ndarray) -> np.ndarray:
        """Whole records of ``ids``."""
        late = start_encoding(self.loaded, *self.references.tokens(ids), [self.loaded.config])
        return late[0].records(self.codec, self.record)


def _union(ids: np.ndarray) -> np.ndarray:
    """The ids that any rank of this tensor-parallel group has, ascending."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return np.unique(ids)
    everyone: list[list[int]] = [[] for _ in range(group.size())]
    torch.distributed.all_gather_object(everyone, ids.tolist(), group=group)
    return np.unique(np.concatenate([np.array(one, np.int64) for one in everyone]))
