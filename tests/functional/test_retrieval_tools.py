"""From references to neighbours by the tools: what they write, going on after a kill, and bad input."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools import embed, index, inspect, neighbours, references, tokenize, tokenizer
from megatron_m3.config import parse
from megatron_m3.data import NeighbourStore, TokenStore
from megatron_m3.errors import M3Error
from megatron_m3.manifest import BlockFolder, map_block, read_manifest
from megatron_m3.references import ReferenceStore
from megatron_m3.retrieval import MISSING, Retriever, VectorIndex, overlap
from megatron_m3.tokenizer import Tokenizer
from tests.launcher import run_module

CHUNK, KEPT, LIMIT = 16, 3, 0.9


def sentence(rng: np.random.Generator, topic: int) -> str:
    """A sentence about one of the topics, whose names are what neighbours are found by."""
    verb, thing = rng.choice(["holds", "makes", "sells", "finds"]), rng.choice(["water", "iron", "bread", "glass"])
    return f"The keeper of topic{topic:02d} {verb} {thing} near gate{rng.integers(60):02d} in year {rng.integers(100)}."


def write_corpus(path: Path, documents: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in documents))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small corpus and all that the tools make of it."""
    folder = tmp_path_factory.mktemp("retrieval")
    rng = np.random.default_rng(0)
    corpus = [(f"doc{n}", " ".join(sentence(rng, n % 20) for _ in range(1 + n % 5))) for n in range(60)]
    copies = [(f"copy{n}", corpus[n][1]) for n in range(0, 60, 4)]
    others = [(f"other{n}", sentence(rng, n % 25)) for n in range(100)]
    train = write_corpus(folder / "train.jsonl", corpus)
    knowledge = write_corpus(folder / "knowledge.jsonl", corpus[:30] + copies + others)
    arguments = lambda *names: [word for name in names for word in (f"--{name}", str(folder / name))]  # noqa: E731
    tokenizer.main(["--input", f"{train},{knowledge}", "--vocab-size", "400", "--output", str(folder / "tokenizer")])
    tokenize.main(["--input", train, *arguments("tokenizer"), "--output", str(folder / "tokens")])
    references.main(["--input", knowledge, *arguments("tokenizer"), "--output", str(folder / "references"),
                     "--reference-length", "48", "--block-size", "40"])
    embed.main([*arguments("references"), "--output", str(folder / "embeddings"), "--size", "256"])
    index.main([*arguments("references", "embeddings"), "--output", str(folder / "index")])
    neighbours.main([*neighbour_arguments(folder), "--output", str(folder / "neighbours")])
    return folder


def neighbour_arguments(folder: Path) -> list[str]:
    names = ("tokens", "tokenizer", "references", "index")
    given = [word for name in names for word in (f"--{name}", str(folder / name))]
    return [*given, "--neighbours", str(KEPT), "--chunk-length", str(CHUNK), "--documents-per-block", "13"]


def artifact_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_neighbours_are_those_of_a_plain_loop(made):
    tokens, store = TokenStore.open(made / "tokens"), ReferenceStore.open(made / "references")
    retriever = Retriever.open(made / "index", made / "references", Tokenizer.load(made / "tokenizer"))
    vectors = retriever.embedder.embed(store.texts(range(len(store))))
    opened = NeighbourStore.open(made / "neighbours", check=True, tokens=tokens.hash, references=store.hash)
    every, lengths = store.tokens(range(len(store)))
    names, counts = tokens.document_ids(), dict.fromkeys(["chunks", "missing", "leak", "same"], 0)
    for document in range(len(tokens)):
        text, rows = tokens.document(document), opened.rows(document)
        overlaps = [overlap(text, row[:length]) for row, length in zip(every, lengths, strict=True)]
        assert len(rows.ids) == -(-len(text) // CHUNK)
        for chunk in range(len(rows.ids)):
            query = retriever.embedder.embed([retriever.tokenizer.decode(text[chunk * CHUNK : (chunk + 1) * CHUNK])])[0]
            scores = vectors @ query
            expected = []
            for one in np.argsort(-scores, kind="stable") if query.any() else []:
                if store.source(one)[0] == names[document]:
                    counts["same"] += 1
                elif overlaps[one] > LIMIT:
                    counts["leak"] += 1
                elif len(expected) < KEPT:
                    expected.append(one)
                if len(expected) == KEPT:
                    break
            counts["chunks"] += 1
            counts["missing"] += KEPT - len(expected)
            valid = rows.valid[chunk]
            assert valid.tolist() == [True] * len(expected) + [False] * (KEPT - len(expected))
            np.testing.assert_allclose(rows.scores[chunk, valid], scores[expected], atol=1e-5)
            assert (rows.ids[chunk, ~valid] == MISSING).all()
            if len(set(np.round(scores[expected], 4))) == KEPT:
                assert rows.ids[chunk].tolist() == expected
    written = json.loads((made / "neighbours" / "counts.json").read_text())
    assert [written[name] for name in ("chunks", "missing", "dropped by filter", "dropped same document")] == [
        counts[name] for name in ("chunks", "missing", "leak", "same")]
    assert min(counts.values()) >= 0 < counts["leak"] * counts["same"]


def test_neighbour_blocks_hold_exact_overlaps(made):
    tokens, store = TokenStore.open(made / "tokens"), ReferenceStore.open(made / "references")
    manifest = read_manifest(made / "neighbours", "neighbours", 1)
    document, largest = 0, 0.0
    for name in sorted(manifest.files):
        block = map_block(made / "neighbours" / name)
        assert {key: str(array.dtype) for key, array in block.items()} == {
            "chunk_offsets": "int64", "ids": "int64", "valid": "bool", "scores": "float32", "overlaps": "float32"}
        for first, last in zip(block["chunk_offsets"], block["chunk_offsets"][1:], strict=False):
            for row in range(first, last):
                slots = (block[name][row] for name in ("ids", "valid", "overlaps"))
                for id, valid, found in zip(*slots, strict=True):
                    reference, length = store.tokens([id] if valid else [])
                    expected = overlap(tokens.document(document), reference[0, : length[0]]) if valid else 0
                    assert found == np.float32(expected)
                    largest = max(largest, found)
            document += 1
    assert document == len(tokens)
    assert 0 < largest <= LIMIT


def test_killed_jobs_go_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    embed_arguments = ["--references", str(made / "references"), "--size", "256"]
    for tool, name, arguments, written in ((embed, "embeddings", embed_arguments, "write_block"),
                                           (neighbours, "neighbours", neighbour_arguments(made), "find_neighbours")):
        output, real, calls = tmp_path / name, getattr(tool, written), []

        def dies(*given, real=real, calls=calls):
            calls.append(given)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(tool, written, dies)
        with pytest.raises(KeyboardInterrupt):
            tool.main([*arguments, "--output", str(output)])
        assert not (output / "manifest.json").exists()
        tool.main([*arguments, "--output", str(output)])
        total = len(read_manifest(output, name, 1).files)
        assert len(calls) == total + 1 > 3
        assert artifact_bytes(output) == artifact_bytes(made / name)
        monkeypatch.setattr(tool, written, real)


def test_blocks_of_neighbours_are_the_same_whoever_writes_them(made, tmp_path):
    given = [*neighbour_arguments(made), "--output", str(tmp_path / "out")]
    options = parse(neighbours.Options, given, "", "")
    folder = BlockFolder(tmp_path / "out", json.loads((made / "neighbours" / "job.json").read_text())["job"])
    for block in (3, 1):
        pickle.loads(pickle.dumps(neighbours.Search(options, folder, None)))(block)
    neighbours.main(given)
    assert artifact_bytes(tmp_path / "out") == artifact_bytes(made / "neighbours")


def test_made_again_the_index_has_the_same_bytes(made, tmp_path, capsys):
    arguments = ["--references", str(made / "references"), "--embeddings", str(made / "embeddings")]
    index.main([*arguments, "--output", str(tmp_path / "index")])
    said = capsys.readouterr().err
    assert "Flat (chosen for" in said
    assert "recall@5 1.0000" in said
    assert artifact_bytes(tmp_path / "index") == artifact_bytes(made / "index")
    index.main([*arguments, "--output", str(tmp_path / "index")])
    assert "made already" in capsys.readouterr().out


def test_recall_is_measured(made):
    vectors = VectorIndex.open(made / "index").faiss_index.reconstruct_n(0, 163)
    embeddings = index.Embeddings(made / "embeddings", ReferenceStore.open(made / "references").hash)
    assert (embeddings.rows(np.arange(163)) == vectors).all()
    likeness = vectors @ vectors.T
    least = -np.sort(-likeness, axis=1)[:, 5]

    class Found:
        def search(self, queries, k):
            ids = np.argsort(-likeness, axis=1)[:, :k]
            ids[::2, 2:] = -1  # every other query finds itself and one neighbour
            return None, ids

    expected = (81 * 1 + 82 * 0.2) / 163
    assert index.recall(Found(), embeddings, vectors, least, 6) == pytest.approx(expected)


def test_inverted_lists_are_read_until_the_recall_is_there(made, tmp_path, capsys):
    index.main(["--references", str(made / "references"), "--embeddings", str(made / "embeddings"), "--output",
                str(tmp_path / "index"), "--factory", "IVF4,Flat", "--recall", "1"])
    assert "reads 4 of 4 lists" in capsys.readouterr().err
    found, exact = (VectorIndex.open(one / "index") for one in (tmp_path, made))
    vectors = exact.embedder().embed(["the keeper of topic03 in year 7"])
    assert found.search(vectors, 3).ids.tolist() == exact.search(vectors, 3).ids.tolist()


def test_evaluation_filter_passes_over_references_like_the_question(made):
    retriever = Retriever.open(made / "index", made / "references", Tokenizer.load(made / "tokenizer"))
    store, k = retriever.references, 4
    question = retriever.tokenizer.encode(store.text(0))
    plain = retriever.retrieve([question, question[:20]], k)
    assert plain.valid.all()
    assert 0 in plain.ids[0]
    filtered = retriever.retrieve([question, question[:20]], k, exclude_overlap_with=[question] * 2)
    assert filtered.valid.all()
    for row, before in zip(filtered.ids, plain.ids, strict=True):
        assert all(overlap(question, tokens[:length]) <= 2 / 3
                   for tokens, length in zip(*store.tokens(row), strict=True))
        kept = [id for id in before if overlap(question, store.tokens([id])[0][0, : store.tokens([id])[1][0]]) <= 2 / 3]
        assert row.tolist()[: len(kept)] == kept
        assert len(kept) < k
    assert retriever.retrieve([], k).ids.shape == (0, k)
    assert not retriever.retrieve([[]], k).valid.any()
    everything = retriever.retrieve([question], len(store) + 5)
    assert everything.valid.sum() == len(store)


def test_inspect_shows_what_was_kept_and_dropped(made, capsys):
    base = [word for name in ("tokenizer", "references", "index") for word in (f"--{name}", str(made / name))]
    capsys.readouterr()
    chunk = ["--tokens", str(made / "tokens"), "--document", "4", "--chunk", "1", "--chunk-length", str(CHUNK)]
    inspect.main([*base, *chunk, "--neighbours", str(KEPT), "--json"])
    shown = json.loads(capsys.readouterr().out)
    rows = NeighbourStore.open(made / "neighbours").rows(4)
    assert [row["reference"] for row in shown["neighbours"] if not row["dropped"]] == rows.ids[1].tolist()
    assert {row["dropped"] for row in shown["neighbours"]} == {"", "same document", "overlap"}
    inspect.main([*base, *chunk, "--neighbours", "1", "--max-overlap", "0"])
    text = capsys.readouterr().out
    dropped = text.count("DROPPED: overlap"), text.count("DROPPED: same document")
    assert text.splitlines()[-1] == f"kept 0, dropped {dropped[0]} by the filter and {dropped[1]} of the same document"
    assert sum(dropped) == len(ReferenceStore.open(made / "references"))  # all have a word in common with it
    inspect.main([*base, "--text", "The keeper of topic03 in the year", "--neighbours", "2"])
    text = capsys.readouterr().out
    assert text.count("\nreference ") == 2
    assert "topic03" in text.split("\nreference ")[1]
    inspect.main([*base, "--text", "?!"])
    assert "nothing found" in capsys.readouterr().out


def change(folder: Path, name: str, target: Path) -> Path:
    """Copy everything, but make ``name`` again from other texts."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / name)
    source = ["--input", write_corpus(target / "changed.jsonl", [(f"doc{n}", f"changed {n}") for n in range(30)])]
    tool = {"tokens": tokenize, "references": references, "tokenizer": tokenizer}[name]
    given = [] if name == "tokenizer" else ["--tokenizer", str(target / "tokenizer")]
    tool.main([*source, *given, "--output", str(target / name)])
    return target


@pytest.mark.parametrize(("name", "message"), [
    ("references", "index: this index was made from another references"),
    ("tokenizer", "tokens: this tokens was made from another tokenizer"),
])
def test_inputs_that_do_not_belong_together_are_refused(made, tmp_path, name, message):
    other = change(made, name, tmp_path / "other")
    with pytest.raises(M3Error, match=message):
        neighbours.main([*neighbour_arguments(other), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_neighbours_of_another_corpus_are_refused(made, tmp_path):
    other = change(made, "tokens", tmp_path / "other")
    with pytest.raises(M3Error, match="holds neighbours made from other inputs"):
        neighbours.main([*neighbour_arguments(other), "--output", str(other / "neighbours")])
    with pytest.raises(M3Error, match="made from another tokens"):
        NeighbourStore.open(made / "neighbours", tokens=TokenStore.open(other / "tokens").hash)
    store = change(made, "references", tmp_path / "third")
    with pytest.raises(M3Error, match="this embeddings was made from another references"):
        index.main(["--references", str(store / "references"), "--embeddings", str(made / "embeddings"), "--output",
                    str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("job", "options", "message"), [
    ("embed", ["--references", "none"], "none: no such folder"),
    ("embed", ["--references", "{made}/references", "--size", "0"], "size=0"),
    ("embed", ["--references", "{made}/references", "--size", "99999999"], "size=99999999: must be at most"),
    ("embed", ["--references", "{made}/references", "--embedder", "transformer"], "model: give it with"),
    ("embed", ["--references", "{made}/references", "--embedder", "transformer", "--model", "{made}"], "model={made}"),
    ("embed", ["--references", "{made}/references", "--colour", "red"], "--colour"),
    ("index", ["--references", "{made}/references", "--embeddings", "{made}/index"], "of kind index, not embeddings"),
    ("index", ["--references", "{made}/references", "--embeddings", "{made}/embeddings", "--factory", "X"], "=X:"),
    ("neighbours", ["--max-overlap", "2"], "max_overlap=2"),
    ("inspect", [], "text: give either"),
])
def test_bad_input_is_one_line_and_nothing_is_written(made, tmp_path, job, options, message):
    given = [option.format(made=made) for option in options]
    named = {"neighbours": neighbour_arguments(made),
             "inspect": [w for n in ("tokenizer", "references", "index") for w in (f"--{n}", str(made / n))]}
    output = [] if job == "inspect" else ["--output", str(tmp_path / "out")]
    module = {"embed": embed, "index": index, "neighbours": neighbours, "inspect": inspect}[job]
    with pytest.raises(M3Error) as caught:
        module.main([*named.get(job, []), *given, *output])
    assert message.format(made=made) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command_ends_with_status_2_and_no_traceback(made, tmp_path):
    damaged = shutil.copytree(made, tmp_path / "damaged")
    path = damaged / "index" / "index.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    arguments = [*neighbour_arguments(damaged), "--output", str(tmp_path / "out")]
    done = run_module("data_tools.neighbours", arguments, expect=2)
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and "index.faiss" in line]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
