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
    ids_BN, places = batch["reference_ids"], batch["chunk_references"]
    first_B1 = np.arange(len(ids_BN))[:, None] * ids_BN.shape[1]
    batch["chunk_references"] = np.where(places < 0, -1, places + first_B1)
    if not config.data.encode_once:
        return batch
    there = np.flatnonzero(ids_BN.ravel() >= 0)
    _, first_M, number = np.unique(ids_BN.ravel()[there], return_index=True, return_inverse=True)
    numbers = np.full(ids_BN.size, -1)
    numbers[there] = number
    return pack_references(batch, there[first_M], numbers, config)


def pack_references(batch: Arrays, kept_M: np.ndarray, numbers: np.ndarray, config: Config, least: int = 1) -> Arrays:
    """The micro-batch with some of its references alone, in as few places of every sequence as they need.

    Args:
        batch: arrays of :func:`stack_sequences`.
        kept_M: places of the references that stay, counted through all sequences.
        numbers: what chunks shall call the reference of each place, ``[B * N]``; those that stay are 0, 1, ….
        config: of the run.
        least: places of a sequence, if there is nothing to keep.
    """
    B, R = len(batch["references"]), config.memory.reference_length
    ranks = config.parallel.tensor if config.parallel.sequence else 1
    unit = ranks // math.gcd(R, ranks)
    count = unit * max(least, -(-len(kept_M) // (B * unit)))
    # the last one is that of no reference
    packed = {"chunk_references": np.append(numbers, -1)[batch["chunk_references"]]}
    for name, empty in (("references", 0), ("reference_lengths", 0), ("reference_ids", -1)):
        shape = batch[name].shape
        rows = np.full((B * count, *shape[2:]), empty, batch[name].dtype)
        rows[: len(kept_M)] = batch[name].reshape(-1, *shape[2:])[kept_M]
        packed[name] = rows.reshape(B, count, *shape[2:])
    return batch | packed
