"""From sequences to a micro-batch, in which a reference that several chunks read may stand once.

Letters: B sequences, N references of a sequence, M different references of the micro-batch.
"""

import math

import numpy as np

from megatron_m3.config import Config

type Arrays = dict[str, np.ndarray]


def stack_sequences(sequences: list[Arrays], config: Config) -> Arrays:
    """The arrays of sequences, each [B, ...]; ``chunk_references`` count through the references of all sequences.

    With ``data.encode_once`` the M references stand once each, in ``ceil(M / B)`` places of every sequence: a chunk may
    read one that stands beside another sequence, since references see the prefix alone. At least one place is there,
    and as many as tensor-parallel ranks that share a sequence can divide.
    """
    batch = {name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}
    if "references" not in batch:
        return batch
    ids_BN, places = batch.pop("reference_ids"), batch["chunk_references"]
    first_B1 = np.arange(len(ids_BN))[:, None] * ids_BN.shape[1]
    batch["chunk_references"] = np.where(places < 0, -1, places + first_B1)
    return _once(batch, ids_BN, config) if config.data.encode_once else batch


def _once(batch: Arrays, ids_BN: np.ndarray, config: Config) -> Arrays:
    B, R = len(ids_BN), config.memory.reference_length
    there = np.flatnonzero(ids_BN.ravel() >= 0)
    _, first_M, number = np.unique(ids_BN.ravel()[there], return_index=True, return_inverse=True)
    ranks = config.parallel.tensor if config.parallel.sequence else 1
    unit = ranks // math.gcd(R, ranks)
    count = unit * max(1, -(-len(first_M) // (B * unit)))
    new_places = np.full(ids_BN.size + 1, -1)  # the last one is that of no reference
    new_places[there] = number
    packed = {"chunk_references": new_places[batch["chunk_references"]]}
    for name in ("references", "reference_lengths"):
        rows = batch[name].reshape(ids_BN.size, -1)
        packed[name] = np.zeros((B * count, rows.shape[1]), rows.dtype)
        packed[name][: len(first_M)] = rows[there[first_M]]
    return batch | packed | {
        "references": packed["references"].reshape(B, count, R),
        "reference_lengths": packed["reference_lengths"].reshape(B, count),
    }
