"""References of selected documents: by a list of ids, by a share; the same bytes however the corpus is shared out."""

import json
from pathlib import Path

import pytest

from data_tools import references
from data_tools.selection import Select
from megatron_m3.errors import ArtifactError, ConfigError, DataError
from megatron_m3.references import ReferenceStore
from megatron_m3.tokenizer import train_tokenizer

NUMBERS = range(3000)


def text_of(number: int) -> str:
    return f"Document {number} says what it is about. " + "More is said of it. " * (number % 30)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents in two files, one of two blocks; some ids are not ASCII, one is there twice, a record is bad."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"id": f"ä {number}", "text": text_of(number)}) for number in NUMBERS]
    (folder / "a.jsonl").write_text("\n".join([*lines, "{bad", lines[7], ""]))
    (folder / "b.txt").write_text("\n\n".join(map(text_of, range(9))))
    train_tokenizer(map(text_of, range(200)), 400, folder / "tokenizer")
    return folder


def run(corpus: Path, output: Path, **options: object) -> ReferenceStore:
    given = {name: options.pop(name) for name in ("ids", "share", "seed") if name in options}
    if "ids" in given:
        path = output.with_name(f"{output.name}.txt")
        path.write_bytes(given["ids"].encode() if isinstance(given["ids"], str) else given["ids"])
        given["ids"] = str(path)
    references.run(references.Options(input=(str(corpus),), tokenizer=str(corpus / "tokenizer"), output=str(output),
                                      select=Select(**given), block_size=500, **options))
    return ReferenceStore.open(output, check=True)


def documents(store: ReferenceStore) -> list[str]:
    """The documents of the references, in order, each once."""
    return list(dict.fromkeys(store.source(id)[0] for id in range(len(store))))


def counts(folder: Path) -> dict:
    return json.loads((folder / "counts.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    assert not (folder / "stages").exists()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_listed_documents_are_taken_whole_and_ids_that_none_has_are_named(corpus, tmp_path, capsys):
    ids = ["b.txt:3", "no such", "ä 2999", "ä 7", "ä 29", "ä 29", "ä 1 ", "ü"]
    store = run(corpus, tmp_path / "some", ids="\ufeff" + "\r\n".join(ids) + "\n\n")
    assert documents(store) == ["ä 7", "ä 29", "ä 2999", "b.txt:3"]
    assert [store.text(0), *store.texts(range(len(store) - 2, len(store)))] == [text_of(7), text_of(7), text_of(1)]
    assert "".join(store.text(id) for id in range(len(store)) if store.source(id)[0] == "ä 29").count("More") == 29
    assert (tmp_path / "some" / "not_found.txt").read_text() == "no such\nä 1 \nü\n"
    found = counts(tmp_path / "some")
    assert (found["documents"], found["skipped"], found["listed"]) == (3010, 1, 7)
    assert (found["not_found"], found["selected"], found["references"]) == (3, 5, len(store))
    shown = capsys.readouterr().err
    assert [line.split() for line in shown.splitlines() if "not_found" in line] == [["not_found", "3"]]
    run(corpus, tmp_path / "all found", ids="ä 5\n")
    assert not (tmp_path / "all found" / "not_found.txt").exists()


def test_a_share_is_drawn_by_ids_alone_and_a_larger_one_holds_it(corpus, tmp_path):
    tenth = documents(run(corpus, tmp_path / "tenth", share=0.1))
    third = documents(run(corpus, tmp_path / "third", share=0.3))
    other = documents(run(corpus, tmp_path / "other", share=0.1, seed=5))
    assert 230 < len(tenth) < 370
    assert 780 < len(third) < 1020
    assert set(tenth) < set(third)
    assert len(set(tenth) & set(other)) < 70
    assert counts(tmp_path / "tenth")["selected"] == len(tenth) + ("ä 7" in tenth)
    both = run(corpus, tmp_path / "both", share=0.3, ids="\n".join(f"ä {number}" for number in range(100)))
    assert documents(both) == [f"ä {number}" for number in range(100) if f"ä {number}" in third]
    assert counts(tmp_path / "both")["not_found"] == 0


def test_the_bytes_do_not_depend_on_the_workers_and_the_hash_does_on_the_selection(corpus, tmp_path, capsys):
    ids = "".join(f"ä {number}\n" for number in NUMBERS[::2]) + "none\n"
    alone = run(corpus, tmp_path / "alone", ids=ids, share=0.5)
    shared = run(corpus, tmp_path / "shared", ids=ids, share=0.5, workers=2, block_megabytes=1)
    assert alone.num_blocks > 1
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    run(corpus, tmp_path / "alone", ids=ids, share=0.5)
    assert "made already" in capsys.readouterr().out
    assert shared.hash == alone.hash
    for other in ({"ids": f"{ids}no other\n", "share": 0.5}, {"ids": ids, "share": 0.5, "seed": 1}, {"ids": ids}, {}):
        with pytest.raises(ArtifactError, match="made from other inputs or settings"):
            run(corpus, tmp_path / "alone", **other)


@pytest.mark.parametrize("options", [{"share": 0.5}, {"ids": "d 1\nd 5"}])
def test_a_part_of_the_corpus_without_a_document_is_no_hindrance(corpus, tmp_path, options):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"id": f"d {one}", "text": "It."}) for one in range(50)))
    (folder / "b.jsonl").write_text(f"{'bad' * 500_000}\n")
    (folder / "tokenizer").symlink_to(corpus / "tokenizer")
    run(folder, tmp_path / "some", **options, block_megabytes=1)
    assert (counts(tmp_path / "some")["documents"], counts(tmp_path / "some")["skipped"]) == (50, 1)


@pytest.mark.parametrize(("options", "message"), [
    ({"ids": "x 1\nx 2\nx 2"}, "no document has one of the 2 ids; the list has such as 'x 1', the corpus such as 'ä 0"),
    ({"ids": b"\xff\xfe\x00\n"}, "no document has one of the 1 ids"),
    ({"ids": "ä 1\nä 2", "share": 1e-9}, "a share of 1e-09 of the 2 ids leaves none"),
    ({"share": 1e-9}, "draws none of the 3,010 documents; give more"),
    ({"ids": "\n\n"}, "no id in it; give document ids, one a line"),
])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_selection_of_nothing_is_one_line_and_leaves_nothing(corpus, tmp_path, options, message, workers):
    if workers == 2 and "ids" in options:
        pytest.skip("the share stands for the others")
    with pytest.raises((ConfigError, DataError), match=message) as error:
        run(corpus, tmp_path / "out", workers=workers, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_selections_that_cannot_be_are_refused(tmp_path):
    for share in (0, -1, 1.5):
        with pytest.raises(ConfigError, match=r"select\.share=.*: must be over 0 and at most 1"):
            Select(share=share)
    with pytest.raises(ConfigError, match=r"select\.seed=3: changes nothing without --select\.share"):
        Select(seed=3)
    with pytest.raises(ConfigError, match=r"select\.seed=-1: must be from 0 to"):
        Select(seed=-1, share=0.5)
    with pytest.raises(ConfigError, match=r"select\.seed=9+: must be from 0 to"):
        Select(seed=int("9" * 80), share=0.5)
    with pytest.raises(DataError, match=r"select\.ids=.*none: no such file"):
        Select(ids=str(tmp_path / "none")).inputs()
