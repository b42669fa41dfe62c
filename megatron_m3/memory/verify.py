"""Whether a bank holds what its model writes: a sample of references is encoded again and compared with the records.

Letters: N references, C lists (a list is what one head of one layer holds of a reference).
"""

import hashlib
import itertools
import json
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_m3.manifest import check_input
from megatron_m3.manifest.blocks import JOB
from megatron_m3.memory.bank import MemoryBank
from megatron_m3.memory.editing import empty_record
from megatron_m3.memory.encode import BATCH_TOKENS, start_encoding
from megatron_m3.memory.write import GROUP
from megatron_m3.model.checkpoint import LoadedModel, ModelDescription
from megatron_m3.platform.progress import Progress
from megatron_m3.references import ReferenceStore


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What a comparison of records with newly encoded memories found."""

    references: int
    """Compared."""
    lists: int
    """Compared: heads, those of all references and memory layers."""
    different: tuple[int, ...]
    """Ids of the references whose records differ in any bit, ascending."""
    different_lists: int
    other_tokens: int
    """Of these, those that keep other tokens."""
    largest_error: float
    """Largest error of a list's decoded keys or values, as a share of their length; 0 where no bit differs."""

    def is_within(self, tolerance: float) -> bool:
        """Whether all are the same, or at least keep the same tokens, with errors of at most ``tolerance``."""
        return not self.different or _is_accepted(self.other_tokens, self.largest_error, tolerance)


def _is_accepted(other_tokens: int, error: float, tolerance: float) -> bool:
    """Whether records that differ in some bits are accepted nevertheless."""
    return not other_tokens and 0 < tolerance >= error


def draw_sample(count: int, total: int, seed: int) -> np.ndarray:
    """``count`` ids below ``total`` (all of them if there are no more), uniformly, by hashes of ``seed``; ascending."""
    moved: dict[int, int] = {}
    drawn = []
    for place in range(min(count, total)):
        number = int.from_bytes(hashlib.sha256(f"{seed}:{place}".encode()).digest()[:8], "little")
        other = place + number % (total - place)
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return np.sort(np.array(drawn, np.int64))


def check_origin(bank: MemoryBank, described: ModelDescription, references: ReferenceStore) -> None:
    """Check that a bank was made from this model and these references.

    Raises:
        ArtifactError: it was made from others.
    """
    given = {"checkpoint": described.weights_hash, "tokenizer": described.tokenizer.hash, "references": references.hash}
    for role, actual in given.items():
        check_input(bank.address, bank.manifest, role, actual)


def verify_sample(
    bank: MemoryBank, loaded: LoadedModel, references: ReferenceStore, ids: np.ndarray, *, tolerance: float = 0.0
) -> SampleReport:
    """Encode references again, pass them through the bank's codec, and compare them with their records bit for bit.

    Last bits may depend on which references are encoded together. So those that differ by more than ``tolerance`` are
    encoded once more, each among the references of its group, as the build did: then only real differences stay.

    Raises:
        ArtifactError: the bank was made from another model or other references, or a record is damaged.
    """
    check_origin(bank, loaded, references)
    config, batch_tokens = bank.configure(loaded.config), built_batch_tokens(bank)
    codec = bank.codec.to(loaded.device)

    def encode(chosen: np.ndarray) -> np.ndarray:
        late = start_encoding(loaded, *references.tokens(chosen), [config], batch_tokens=batch_tokens)
        records = late[0].records(codec, bank.record)
        records[np.isin(chosen, bank.places.deleted)] = empty_record(bank.record)
        return records

    found = []
    with Progress("sample", len(ids), "references") as progress:
        for first in range(0, len(ids), GROUP):
            part = ids[first : first + GROUP]
            differences = _compare(bank, part, encode(part))
            doubtful = [place for place, one in enumerate(differences) if one.matters(tolerance)]
            groups = ((_group(bank, int(part[place])).tolist(), place) for place in doubtful)
            for group, pairs in itertools.groupby(groups, operator.itemgetter(0)):
                rows = [place for _, place in pairs]
                again = encode(np.array(group))[np.searchsorted(group, part[rows])]
                for place, one in zip(rows, _compare(bank, part[rows], again), strict=True):
                    differences[place] = one
            found += differences
            progress.advance(len(part))
    return SampleReport(
        references=len(ids), lists=len(ids) * int(bank.settings.memory_lists.sum()),
        different=tuple(one.id for one in found if one.lists), different_lists=sum(one.lists for one in found),
        other_tokens=sum(one.other_tokens for one in found), largest_error=max((one.error for one in found), default=0),
    )


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """Of one reference's record from the newly encoded one; fields as in :class:`SampleReport`."""

    id: int
    lists: int
    other_tokens: int
    error: float

    def matters(self, tolerance: float) -> bool:
        return self.lists > 0 and not _is_accepted(self.other_tokens, self.error, tolerance)


def _compare(bank: MemoryBank, ids: np.ndarray, fresh_NB: np.ndarray) -> list[_Difference]:
    stored_NB = bank.records(ids)
    rows = np.flatnonzero((stored_NB != fresh_NB).any(1))
    found = {int(ids[row]): one for row, one in zip(rows, _differences(bank, stored_NB[rows], fresh_NB[rows]),
                                                    strict=True)}
    return [_Difference(id=id, lists=lists, other_tokens=other, error=error)
            for id in ids.tolist() for lists, other, error in [found.get(id, (0, 0, 0.0))]]


def _differences(bank: MemoryBank, stored_NB: np.ndarray, fresh_NB: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Lists that differ, those that keep other tokens, and the largest error, of each record."""
    if not len(stored_NB):
        return
    held_LG = bank.settings.memory_lists
    (codes, places, kept, kv), (fresh_codes, fresh_places, fresh_kept, fresh_kv) = (
        _unpack(bank, records) for records in (stored_NB, fresh_NB)
    )
    other_NC = (places != fresh_places).any(-1)[:, held_LG] | (kept != fresh_kept)[:, None]
    lists_NC = torch.from_numpy((codes != fresh_codes).any(-1)) | other_NC
    wrong, length = (part.square().sum((-2, -1)).sqrt() for part in (kv - fresh_kv, fresh_kv))
    error_N = (wrong / length.clamp_min(1e-30)).amax((1, 2, 3)).nan_to_num(torch.inf, torch.inf)
    yield from zip(lists_NC.sum(1).tolist(), other_NC.sum(1).tolist(), error_N.tolist(), strict=True)


def _unpack(bank: MemoryBank, records_NB: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Codes, positions, kept tokens, and decoded keys and values."""
    codes_NCB, positions, num_kept = bank.record.unpack(records_NB)
    return codes_NCB, positions, num_kept, bank.codec.decode(codes_NCB, positions, num_kept)


def _group(bank: MemoryBank, id: int) -> np.ndarray:
    """The references that were encoded together with one, ascending."""
    ids, place = bank.places.block(id)
    first = place // GROUP * GROUP
    return ids[first : first + GROUP]


def built_batch_tokens(bank: MemoryBank) -> int:
    """Most tokens of a pass of the build, as its record of the job says; the default where that is gone."""
    try:
        return int(json.loads((bank.folder / JOB).read_text())["job"]["settings"]["batch_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return BATCH_TOKENS
