"""Documents of JSON lines are those of Python's decoder, whatever reads them."""

import json
from pathlib import Path

import pyarrow
import pytest

from data_tools import records
from data_tools.pieces import make_plan
from data_tools.records import BadRecordError, Document, Piece, in_batches, read_records
from megatron_m3.errors import DataError

VALUES = ("0", "-0", "1.0", "0.1", "1E+2", "1e400", "-1e-400", "9007199254740993", "18446744073709551615",
          "18446744073709551616", "-9223372036854775809", "1" * 400, "1" * 5000, "01", "1.", "+1", "NaN", "-Infinity",
          "true", "null", '[1, {"a": 36893488147419103232}]', '"\\ud83d\\ude00"', '"\\ud800"', '"a\\u0000b"', '"\\x"',
          '"\t"', '"\u2028"', '"\u00a0"', "[" * 1022 + "]" * 1022, "[" * 1100 + "]" * 1100, '""', '"x", "id": 2', "'x'")


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
    document = (f"a.jsonl:{number}" if given in (None, "") else str(given), record["text"])
    try:
        "".join(document).encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    return document


def test_files_of_one_name_in_several_folders_are_called_after_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "a.jsonl" for folder in ("x/one", "y/one", "two")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text('{"text": "t"}\n')
    assert names(paths) == ["x/one/a.jsonl", "y/one/a.jsonl", f"{tmp_path.name}/two/a.jsonl"]
    assert names(paths[1:]) == ["one/a.jsonl", "two/a.jsonl"]
    assert names([paths[0], paths[0]]) == ["a.jsonl", "a.jsonl"]
    [[piece, _]] = make_plan(paths[1:], 1 << 20)
    assert [found for _, found, _ in read_records(piece)] == [("one/a.jsonl:1", "t")]


def names(paths: list[Path]) -> list[str]:
    return [piece.name for block in make_plan(paths, 1 << 20) for piece in block]


def test_of_a_zstd_file_that_ends_early_nearly_all_is_read(tmp_path: Path) -> None:
    data = pyarrow.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(30_000)), "zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(data[:-4])
    found = []
    with pytest.raises(DataError, match="damaged zstd file"):
        found += (text for _, (_, text), _ in read_records(Piece(tmp_path / "a.jsonl.zst")))
    assert len(found) > 20_000
    assert found == [str(number) for number in range(len(found))]


def test_documents_are_worked_on_by_number_and_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BATCH", 3)
    monkeypatch.setattr(records, "BATCH_CHARACTERS", 10)
    documents = [Document("i", "x" * length) for length in (1, 2, 3, 4, 5, 6, 100, 1)]
    batches = list(in_batches(iter(documents)))
    assert [[len(document.text) for document in batch] for batch in batches] == [[1, 2, 3], [4, 5, 6], [100], [1]]
    assert list(in_batches([])) == []
