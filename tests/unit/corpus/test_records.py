"""Documents of JSON lines are those of Python's decoder, whatever reads them."""

import json
from pathlib import Path

import pytest

from data_tools.records import BadRecordError, Piece, read_records

VALUES = ("0", "-0", "1.0", "0.1", "1E+2", "1e400", "-1e-400", "9007199254740993", "18446744073709551615",
          "18446744073709551616", "-9223372036854775809", "1" * 400, "1" * 5000, "01", "1.", "+1", "NaN", "-Infinity",
          "true", "null", '[1, {"a": 36893488147419103232}]', '"\\ud83d\\ude00"', '"\\ud800"', '"a\\u0000b"', '"\\x"',
          '"\t"', '"\u2028"', '"\u00a0"', "[" * 1022 + "]" * 1022, "[" * 1100 + "]" * 1100, '"x", "id": 2', "'x'")


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_lines_as_the_decoder_of_python_has_them(value: str, tmp_path: Path) -> None:
    lines = [f'{{"id": {value}, "text": "t"}}', f'{{"text": {value}}}', f'{{"more": {value}, "text": "t"}}', value,
             f'\ufeff{{"text": "t", "id": {value}}}', f'{{"text": "t", "text": {value}}}', f'{{"text": "t"}} {value}']
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode())
    assert [plain(found) for _, found, _ in read_records(Piece(path))] == [
        expected(line.removeprefix("\ufeff"), number) for number, line in enumerate(lines, 1)]


def plain(found: object) -> object:
    """A document as a tuple, an error as its reason."""
    return str(found) if isinstance(found, BadRecordError) else found


def expected(line: str, number: int) -> object:
    """What docs/data.md promises of a line, told with Python's decoder alone."""
    try:
        record = json.loads(line)
    except ValueError:
        return "not JSON"
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return "no text"
    if not record["text"].strip():
        return "empty text"
    given = record.get("id")
    document = (f"a.jsonl:{number}" if given is None else str(given), record["text"])
    try:
        "".join(document).encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    return document
