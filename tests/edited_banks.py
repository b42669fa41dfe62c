"""Editing banks in tests: the commands, and what a bank holds before and after."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from tests.tiny_model import sentence


def texts(path, count, seed):
    lines = [json.dumps({"id": f"{seed}:{place}", "text": sentence(seed + place, 7)}) for place in range(count)]
    path.write_text("\n".join(lines))
    return str(path)


def update(bank, references, run=None, word="update"):
    from launch.m3 import main

    main(["bank", word, "--bank", str(bank), "--references", str(references),
          *(["--checkpoint", str(run)] if run else [])])


def copy_of(bank, tmp_path):
    shutil.copytree(bank, tmp_path / "bank")
    return tmp_path / "bank"


def open_bank(folder, **options):
    from megatron_m3.memory import MemoryBank

    return MemoryBank.open(folder, **options)


def compact(folder):
    from megatron_m3.memory.editing import compact_bank

    return compact_bank(folder)


def delete(folder, ids):
    from megatron_m3.memory.editing import delete_references

    return delete_references(folder, np.array(ids))


def records(folder):
    bank = open_bank(folder, check=True)
    return bank.records(range(len(bank)))


def digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}
