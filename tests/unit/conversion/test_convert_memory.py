"""Conversion holds one tensor at a time: peak memory does not grow with the model, in either direction."""

import json
import sys
from pathlib import Path

from tests.launcher import run_command

CONSTANT = 64 << 20
"""Bytes: allocators, and pages of libraries that the system took away meanwhile and that are read again."""


def test_peak_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    path = Path(__file__).with_name("convert_peak.py")
    found = json.loads(run_command([sys.executable, str(path), str(tmp_path)]).stdout.splitlines()[-1])
    limit = 1.2 * found["largest"] + CONSTANT
    assert found["model"] > 2 * limit, "the model must not fit"
    assert found["from"] < limit, found
    assert found["to"] < limit, found
    assert found["same"]
