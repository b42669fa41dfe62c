"""m3 data inspect: a text, or a chunk of the corpus, beside its neighbours, their scores and what the filter drops.

Give --text, or --tokens with --document and --chunk.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, exit_on_user_error

if TYPE_CHECKING:
    import numpy as np

    from megatron_m3.retrieval import Retriever


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    tokenizer: str
    """Folder of the tokenizer, made by `m3 data tokenizer`."""
    references: str
    """Folder of the references, made by `m3 data references`."""
    index: str
    """Folder of their index, made by `m3 data index`."""
    text: str = ""
    """Text to retrieve for."""
    tokens: str = ""
    """Folder of the tokenized corpus, made by `m3 data tokenize`."""
    document: int = 0
    """Number of the document in the corpus, from 0."""
    chunk: int = 0
    """Number of the chunk in the document, from 0."""
    chunk_length: int = 64
    """Tokens in a chunk."""
    neighbours: int = 5
    """Neighbours to show, beside those dropped before them."""
    max_overlap: float | None = None
    """References that overlap more are dropped; by default 0.9 with a document (as in training), 2/3 with a text."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.tokens):
            raise ConfigError("text: give either --text, or --tokens with --document and --chunk")
        for name, least in (("document", 0), ("chunk", 0), ("chunk_length", 1), ("neighbours", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")


class Query(NamedTuple):
    """What is retrieved for."""

    title: str
    chunk: list[int]
    around: "np.ndarray"
    """Tokens that a neighbour must not overlap with."""
    document_id: str | None
    """Document whose pieces are dropped."""
    max_overlap: float


def run(options: Options) -> None:
    """Print the query and its neighbours."""
    from megatron_m3.retrieval import Retriever
    from megatron_m3.tokenizer import Tokenizer

    retriever = Retriever.open(options.index, options.references, Tokenizer.load(options.tokenizer))
    query = text_query(options, retriever) if options.text else chunk_query(options, retriever)
    text, rows = retriever.tokenizer.decode(query.chunk), find(query, retriever, options.neighbours)
    if options.json:
        print(json.dumps({"query": query.title, "text": text, "max_overlap": query.max_overlap, "neighbours": rows}))
    else:
        print(render(query, text, rows))


def text_query(options: Options, retriever: "Retriever") -> Query:
    """The query that ``options.text`` is."""
    import numpy as np

    chunk = retriever.tokenizer.encode(options.text)
    limit = 2 / 3 if options.max_overlap is None else options.max_overlap
    return Query("text", chunk, np.array(chunk), None, limit)


def chunk_query(options: Options, retriever: "Retriever") -> Query:
    """The query that a chunk of the corpus is.

    Raises:
        ConfigError: there is no such document or chunk.
    """
    from data_tools.neighbours import REACH, Corpus
    from megatron_m3.platform import select

    select()
    from megatron_m3.data import TokenStore

    tokens = TokenStore.open(options.tokens, tokenizer_hash=retriever.tokenizer.hash)
    limit = 0.9 if options.max_overlap is None else options.max_overlap
    corpus = Corpus(tokens, retriever, options.chunk_length, limit)
    place = options.document, options.chunk
    if options.document >= len(tokens):
        raise ConfigError(f"document={options.document}: {options.tokens} has documents 0-{len(tokens) - 1}")
    if options.chunk >= corpus.num_chunks(options.document):
        last = corpus.num_chunks(options.document) - 1
        raise ConfigError(f"chunk={options.chunk}: document {options.document} has chunks 0-{last}")
    document_id = corpus.document_ids[options.document]
    title = f"chunk {options.chunk} of document {options.document} ({document_id})"
    return Query(title, corpus.read(*place).tolist(), corpus.read(*place, REACH), document_id, limit)


def find(query: Query, retriever: "Retriever", k: int) -> list[dict[str, Any]]:
    """The ``k`` neighbours, and what was dropped before the last of them, by falling score."""
    vectors, fetch = retriever.embed([query.chunk]), min(len(retriever.index), 2 * k + 4)
    rows: list[dict[str, Any]] = []
    while True:
        scores, ids, valid = (column[0] for column in retriever.index.search(vectors, fetch))
        for score, id in list(zip(scores[valid], ids[valid], strict=True))[len(rows) :]:
            rows.append(judge(query, retriever, int(id), float(score)))
            if sum(not row["dropped"] for row in rows) == k:
                return rows
        if not valid.all() or fetch == len(retriever.index):
            return rows
        fetch = min(len(retriever.index), 4 * fetch)


def judge(query: Query, retriever: "Retriever", id: int, score: float) -> dict[str, Any]:
    """What is to be shown of a reference, and why it is dropped, if it is."""
    from megatron_m3.retrieval import exceeds_overlap, overlap

    tokens, lengths = retriever.references.tokens([id])
    document, first = retriever.references.source(id)
    leaks = exceeds_overlap(query.around, tokens, lengths, query.max_overlap)[0]
    return {
        "reference": id, "score": round(score, 4),
        "dropped": "same document" if document == query.document_id else "overlap" if leaks else "",
        "overlap": round(overlap(query.around, tokens[0, : lengths[0]]), 4), "document": document,
        "first_token": first, "text": retriever.references.text(id),
    }


def render(query: Query, text: str, rows: list[dict[str, Any]]) -> str:
    """The query and its neighbours for people."""
    parts = [f"{query.title}:", textwrap.indent(text, "    ") or "    (empty)"]
    parts += [f"references with an overlap above {query.max_overlap:.3g} are dropped"]
    for row in rows:
        note = f"  DROPPED: {row['dropped']}" if row["dropped"] else ""
        figures = f"score {row['score']:.3f}  overlap {row['overlap']:.3f}"
        source = f"document {row['document']} from token {row['first_token']}"
        parts.append(f"reference {row['reference']}  {figures}  {source}{note}")
        parts.append(textwrap.indent(row["text"], "    "))
    reasons = [row["dropped"] for row in rows]
    tally = (f"kept {reasons.count('')}, dropped {reasons.count('overlap')} by the filter and "
             f"{reasons.count('same document')} of the same document")
    return "\n".join([*parts, tally if rows else "nothing found: no word of it is in any reference"])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data inspect``."""
    run(parse(Options, argv, "m3 data inspect", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
