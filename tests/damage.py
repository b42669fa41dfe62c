"""A byte of a job's stage that changes on disk before the next stage reads it."""

import json
from pathlib import Path

import pytest

from data_tools.shared_work import Workers


def flip(path: Path, place: int) -> None:
    """Change one bit of a file; a negative place counts from its end."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_after(monkeypatch: pytest.MonkeyPatch, stage: str, file: str, place: int | str) -> None:
    """Have a byte of ``file`` flipped when ``stage`` is done: the first of an array where one is named."""
    run, left = Workers.run, [stage]

    def runs_and_damages(self, label, folder, *given):
        run(self, label, folder, *given)
        if left == [folder.folder.name]:
            path = folder.folder / file
            flip(path, first_byte(path, place) if isinstance(place, str) else place)
            left.clear()

    monkeypatch.setattr(Workers, "run", runs_and_damages)


def first_byte(path: Path, name: str) -> int:
    """Where an array of a safetensors file begins."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8:start])[name]["data_offsets"]
    assert first < last
    return int(start + first)
