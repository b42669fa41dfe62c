"""Bank reading beside bare positional reads of the same bytes, from the disk and from the page cache, as banks grow.

    python -m tests.benchmarks.bench_reading [BANK]

Banks of 10^3 to 10^6 references repeat the records of BANK, or of a demo's bank, in shards of their own (up to 6 GB in
a temporary folder). Ids are random and distinct, in batches of 40 (8 sequences read 5 references each). The floor reads
the same records in the same batches with the same number of threads and does nothing with them. From the disk: shards
are dropped from the page cache before every round; wall time. From the page cache: CPU time of all threads, which on a
busy machine says more. Then the tiers of one bank: decoded, records in RAM, page cache, web server, local folder of a
web server's records. One thread decodes.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_m3.platform import select

if TYPE_CHECKING:
    from megatron_m3.memory import MemoryBank

SIZES, MOST_BYTES, READS, BATCH, ROUNDS = (1_000, 10_000, 100_000, 1_000_000), 6 << 30, 400, 40, 3


def main() -> None:
    """Print both tables."""
    import torch

    torch.set_num_threads(1)
    select()
    from megatron_m3.memory import MemoryBank

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bank = MemoryBank.open(sys.argv[1] if len(sys.argv) > 1 else build(folder))
        print(f"codec {bank.codec_name}, records of {bank.record_bytes:,} bytes; memories a second, and share of pread")
        print(f"{'':>12}{'from the disk':^48}{'from the page cache':^48}")
        print(f"{'references':>12}" + 2 * f"{'pread':>10}{'checked':>18}{'decoded':>18}  ")
        for count in SIZES:
            if count * bank.record_bytes <= MOST_BYTES:
                with grown(bank, folder / str(count), count) as large:
                    row(large)
        with grown(bank, folder / "tiers", SIZES[1]) as some:
            tiers(some, folder)


def build(folder: Path) -> Path:
    """A bank of the demo's shape."""
    from launch import build_bank
    from tests.benchmarks.bench_bank import NUM_REFERENCES, make_artifacts

    make_artifacts(folder)
    build_bank.main(["--checkpoint", str(folder / "run"), "--references", str(folder / str(NUM_REFERENCES)),
                     "--output", str(folder / "bank")])
    return folder / "bank"


@contextmanager
def grown(bank: "MemoryBank", folder: Path, count: int) -> Iterator["MemoryBank"]:
    """A bank of ``count`` references for the length of a block, with the records of another again and again."""
    import shutil

    from megatron_m3.manifest import hash_file, write_manifest
    from megatron_m3.memory import MemoryBank
    from megatron_m3.memory.bank import shard_name

    settings = replace(bank.settings, num_references=count, block_size=4096)
    records = bank.records(np.arange(4096) % len(bank)).tobytes()
    folder.mkdir()
    try:
        shutil.copytree(bank.folder / "codec", folder / "codec")
        files = {name: entry for name, entry in bank.manifest.files.items() if name.startswith("codec/")}
        for index in range(settings.num_blocks):
            path = folder / shard_name(index)
            path.write_bytes(records[: len(settings.block(index)) * bank.record_bytes])
            files[path.name] = (files[shard_name(0)] if path.stat().st_size == len(records) and index
                                else hash_file(path))
        write_manifest(folder, replace(bank.manifest, settings=settings.to_dict(), files=files))
        yield MemoryBank.open(folder)
    finally:
        shutil.rmtree(folder)


def drop(bank: "MemoryBank") -> None:
    """Make the next read of every shard come from the disk."""
    for path in bank.folder.glob("*.bin"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def batches(bank: "MemoryBank", seed: int) -> list[np.ndarray]:
    """Random distinct ids."""
    drawn = np.random.default_rng(seed).choice(len(bank), min(READS, len(bank)), replace=False)
    return np.array_split(drawn, -(-len(drawn) // BATCH))


@contextmanager
def bare(bank: "MemoryBank") -> Iterator[Callable[[np.ndarray], object]]:
    """Reads the records of a batch with bare preads, as many threads at a time as the bank's reader."""
    files = [os.open(path, os.O_RDONLY) for path in sorted(bank.folder.glob("*.bin"))]
    size, block, storage = bank.record_bytes, bank.settings.block_size, bank.reader.storage

    def pread(ids: np.ndarray) -> None:
        for id in ids.tolist():
            os.pread(files[id // block], size, id % block * size)

    with ThreadPoolExecutor(storage.threads) as pool:
        threads = min(storage.threads, BATCH // storage.records)
        yield lambda ids: list(pool.map(pread, np.array_split(ids, threads)))
    for file in files:
        os.close(file)


def rate(bank: "MemoryBank", read: Callable[[np.ndarray], object], clock: Callable[[], float], *, cold: bool) -> float:
    """Most memories a second of some rounds; ids differ between them."""
    found = []
    for turn in range(ROUNDS):
        ids = batches(bank, turn)
        if cold:
            drop(bank)
        else:
            for some in ids:
                bank.rows(some)
        start = clock()
        for some in ids:
            read(some)
        found.append(sum(map(len, ids)) / (clock() - start))
    return max(found)


def row(bank: "MemoryBank") -> None:
    """One size: bare reads, reads that are checked, reads that are decoded."""
    text = f"{len(bank):>12,}"
    with bare(bank) as floor:
        for cold, clock in ((True, time.perf_counter), (False, time.process_time)):
            least, *others = (rate(bank, read, clock, cold=cold) for read in (floor, bank.rows, bank.read))
            text += f"{least:>10,.0f}" + "".join(f"{one:>10,.0f} ({one / least:>5.3f})" for one in others) + "  "
    print(text, flush=True)


def tiers(bank: "MemoryBank", folder: Path) -> None:
    """The same memories from each tier; the web server is on this machine, in a process of its own."""
    from megatron_m3.memory import MemoryBank, WarmSource
    from tests.range_server import in_a_process

    print(f"\n{'tier':<34}{'bytes a memory':>16}{'memories/s':>14}{'CPU ms a memory':>18}")
    plenty, ids = 1 << 33, batches(bank, 0)

    def show(name: str, size: int, read: Callable[[np.ndarray], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for some in ids:
            read(some)
        count, wall, cpu = sum(map(len, ids)), time.perf_counter() - wall, time.process_time() - cpu
        print(f"{name:<34}{size:>16,}{count / wall:>14,.0f}{1e3 * cpu / count:>18.3f}", flush=True)

    for name, decoded in (("decoded", plenty), ("records in RAM", 0)):
        source = WarmSource(bank, cache_bytes=plenty, decoded_bytes=decoded)
        for some in ids:
            source.fetch(some)
        show(name, source.decoded.row_bytes if decoded else source.records.row_bytes, source.fetch)
    size = bank.record_bytes
    show("page cache", size, bank.read)
    drop(bank)
    show("disk", size, bank.read)
    with in_a_process(bank.folder) as address:
        show("web server", size, MemoryBank.open(address).read)
        kept = MemoryBank.open(address)
        kept.keep_in(folder / "kept")
        show("web server, and kept", size, kept.read)
        show("kept", size, kept.read)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
