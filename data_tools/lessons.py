"""m3 data lessons: texts that teach a model to read memories, from the WordNet glosses that come with the project.

references.jsonl         the knowledge base: long references, of several "X: GLOSS" lines, and short ones, of one
train.jsonl              documents of lines "The word X means GLOSS.", and the reference that stands at each chunk
train_text.jsonl         the same documents behind their references as text: what a model without memory would read
heldout_short.jsonl      lines to score, of entries that no training text says or mentions: the reference is the entry
heldout_long.jsonl       the same questions; the entry stands among others in a long reference
heldout_five.jsonl       the same; four other long references stand beside the right one
calibration_*.jsonl      the same three for other entries, to choose layers and settings by

Documents fill their chunks: a line is asked where its reference can be read already, and lines are chosen so that few
tokens are left over. Documents have equal lengths, so no training sequence of a multiple of it cuts one.
"""

import json
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_tools.documents import show_counts
from data_tools.heldout import BESIDE, Mentions, choose_heldout, phrase, score_lines
from data_tools.packing import Costs, Reference, count_tokens, pack
from data_tools.texts import write_texts
from data_tools.wordnet import CORPUS, KIND, SCHEMA, Entry, hash_order, load_entries
from megatron_m3.config import parse
from megatron_m3.errors import ConfigError, DataError, exit_on_user_error
from megatron_m3.manifest import Manifest, hash_file, is_finished

if TYPE_CHECKING:
    from megatron_m3.tokenizer import Tokenizer

ORDERS = ("hash", "alphabet", "related")
LONG, SHORT, NONE = "L", "S", "-"
TRIES = 12
"""Choices of lines for a document, of which the fullest is taken."""
FILLING = 64
"""Entries that go once more with those that were never asked, so that these fill whole documents."""
NEW_LINE_WORTH = 10
"""Tokens left over that an entry never asked before is worth."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the tool."""

    tokenizer: str
    """Folder of the tokenizer that counts the tokens."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    entries: tuple[str, ...] = ()
    """Files of more entries to teach, {"id", "word", "gloss"} a line, such as `m3 data plain-text` makes."""
    documents: tuple[str, ...] = ("LSLS", "LLSS", "LLLS")
    """Kinds of document, taken in turn: for each chunk a long reference (L), a short one (S) or none (-)."""
    orders: tuple[str, ...] = ORDERS
    """Which entries stand together in long references, one pass over all entries each: hash (any), alphabet
    (neighbours in the alphabet) or related (neighbours in WordNet, much alike)."""
    heldout: int = 500
    """Questions of held-out entries."""
    calibration: int = 200
    """Questions of calibration entries."""
    longest_gloss: int = 160
    """Characters; entries with longer ones (at 160 these are 4 %) are left out."""
    shortest_reference: int = 100
    """Tokens at which a long reference is full."""
    reference_length: int = 128
    """Most tokens in a reference."""
    chunk_length: int = 64
    """Tokens in a chunk; memory.chunk_length of the training to come."""
    seed: int = 1234
    """Chooses what is held out, which entries stand together and which lines are asked."""

    def __post_init__(self) -> None:
        for name, least in (("heldout", BESIDE + 1), ("calibration", BESIDE + 1), ("longest_gloss", 20), ("seed", 0),
                            ("shortest_reference", 1), ("reference_length", self.shortest_reference),
                            ("chunk_length", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.orders or not set(self.orders) <= set(ORDERS):
            raise ConfigError(f"orders={','.join(self.orders)}: give some of {', '.join(ORDERS)}")
        if len({len(kind) for kind in self.documents}) != 1 or not all(
            kind.startswith(LONG) and set(kind) <= {LONG, SHORT, NONE} for kind in self.documents
        ):
            raise ConfigError(f"documents={','.join(self.documents)}: give equally long words of L, S and -, L first")

    @property
    def document_tokens(self) -> int:
        """Most tokens in a document, EOS included."""
        return len(self.documents[0]) * self.chunk_length


class Question(NamedTuple):
    """An entry that a document may ask."""

    entry: Entry
    first: int
    """Token of the document from which on its reference can be read."""


def choose_lines(
    questions: list[Question], costs: dict[str, Costs], room: int, asked: Counter[str], draw: random.Random
) -> list[Entry]:
    """Entries for a document to say, in an order such that each one's reference can be read, and ``room`` is filled."""
    best: list[Entry] = []
    most = -1
    for _ in range(TRIES):
        draw.shuffle(questions)
        left, chosen, used = list(questions), [], 0
        while left:
            found = next((one for one in left if one.first <= used and used + costs[one.entry.id].asked <= room), None)
            if found is None:
                break
            left.remove(found)
            chosen.append(found.entry)
            used += costs[found.entry.id].asked
        worth = used + NEW_LINE_WORTH * sum(not asked[entry.id] for entry in chosen)
        if worth > most:
            best, most = chosen, worth
    return best


class Lessons:
    """Documents and their references, made in passes over the entries."""

    def __init__(self, entries: Sequence[Entry], costs: dict[str, Costs], options: Options) -> None:
        self.entries, self.costs, self.options = entries, costs, options
        self.references: dict[str, Reference] = {}
        self.documents: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self._draw = random.Random(f"{options.seed} lessons")
        self._longs: deque[Reference] = deque()
        self._singles: deque[Entry] = deque()
        self.short = 0
        """Documents that lack their last chunk."""

    def teach(self) -> None:
        """A pass for each order, then one for entries that were never asked."""
        for order in self.options.orders:
            self._pass(order, self._sorted(order, self.entries))
        rest = [entry for entry in self.entries if not self.asked[entry.id]]
        if rest:
            self._pass("rest", [*rest, *self._sorted("hash", self.entries)[:FILLING]])

    def _sorted(self, order: str, entries: Sequence[Entry]) -> list[Entry]:
        if order == "hash":
            return sorted(entries, key=lambda entry: hash_order(entry, f"{self.options.seed} pass"))
        if order == "alphabet":
            return sorted(entries, key=lambda entry: (entry.word.casefold(), entry.id))
        return [*entries]

    def _pass(self, name: str, entries: Sequence[Entry]) -> None:
        limits = self.options.shortest_reference, self.options.reference_length
        groups = list(pack(entries, self.costs, *limits))
        self._draw.shuffle(groups)
        self._longs.extend(Reference(f"{name} {group[0].id}", group) for group in groups)
        kinds = self.options.documents
        while len(self._longs) >= (kind := kinds[len(self.documents) % len(kinds)]).count(LONG):
            self._add_document(kind)

    def _single(self) -> Reference:
        if not self._singles:
            self._singles.extend(sorted(self.entries, key=lambda one: hash_order(one, f"{self.options.seed} single")))
        entry = self._singles.popleft()
        return Reference(f"single {entry.id}", (entry,))

    def _add_document(self, kind: str) -> None:
        take = {LONG: self._longs.popleft, SHORT: self._single, NONE: lambda: None}
        placed = [take[letter]() for letter in kind]
        chosen = self._choose(placed)
        if self._is_short(chosen):  # a reference was out of lines before the next could be read
            placed.sort(key=lambda reference: -len(reference.entries) if reference else 0)
            chosen = self._choose(placed)
        self.short += self._is_short(chosen)
        self.asked.update(entry.id for entry in chosen)
        self.references |= {reference.id: reference for reference in placed if reference}
        self.documents.append({
            "id": f"lesson {len(self.documents)}",
            "text": "\n".join(entry.sentence for entry in chosen),
            "references": [reference.id if reference else None for reference in placed],
        })

    def _choose(self, placed: Sequence[Reference | None]) -> list[Entry]:
        questions = [
            Question(entry, chunk * self.options.chunk_length)
            for chunk, reference in enumerate(placed)
            if reference
            for entry in reference.entries
        ]
        return choose_lines(questions, self.costs, self.options.document_tokens, self.asked, self._draw)

    def _is_short(self, chosen: Sequence[Entry]) -> bool:
        """Whether a document that says ``chosen`` lacks its last chunk."""
        tokens = sum(self.costs[entry.id].asked for entry in chosen)
        return tokens <= self.options.document_tokens - self.options.chunk_length


def check_tokens(texts: Sequence[str], most: int, tokenizer: "Tokenizer") -> int:
    """The tokens of all texts.

    Raises:
        DataError: one has more than ``most``: the tokenizer joins what stands on two lines.
    """
    lengths = [len(one) for one in tokenizer.encode_batch(texts)]
    if max(lengths) > most:
        raise DataError(f"{tokenizer.folder}: does not part tokens at line ends; lessons need a tokenizer that does")
    return sum(lengths)


def read_entries(files: Sequence[str], longest_gloss: int) -> list[Entry]:
    """The entries of JSONL files whose gloss has at most ``longest_gloss`` characters.

    Raises:
        DataError: names the file that does not hold such lines.
    """
    entries = []
    for name in files:
        try:
            rows = [json.loads(line) for line in Path(name).read_bytes().splitlines()]
            found = [Entry(row["id"], row["word"], row["gloss"], name) for row in rows]
            if not all(isinstance(field, str) for entry in found for field in entry):
                raise TypeError("one that is not text")
            entries += found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name}: not lines with id, word and gloss ({error}); mend it") from None
    return [entry for entry in entries if len(entry.gloss) <= longest_gloss]


def make_texts(
    entries: Sequence[Entry], more: Sequence[Entry], tokenizer: "Tokenizer", options: Options
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The lines of each file, and counts; entries are held out of ``entries``, and what says them of ``more``."""
    costs = count_tokens([*entries, *more], tokenizer)
    fitting = [entry for entry in entries if costs[entry.id].stated <= options.reference_length]
    limits = options.shortest_reference, options.reference_length
    groups = choose_heldout(fitting, costs, options.heldout + options.calibration, options.seed, *limits)
    left_out = Mentions(phrase(entry.word) for group in groups for entry in group)
    glosses = {phrase(entry.gloss) for group in groups for entry in group}
    taught = [
        entry
        for entry in (*fitting, *more)
        if costs[entry.id].stated <= options.reference_length
        and phrase(entry.gloss) not in glosses
        and not left_out.find_entry(entry)
    ]
    lessons = Lessons(taught, costs, options)
    lessons.teach()
    references = list(lessons.references.values())
    texts = {
        "references": [{"id": one.id, "text": one.text} for one in references],
        "train": lessons.documents,
        "train_text": [
            {"id": document["id"],
             "text": "\n".join([*(lessons.references[one].text for one in document["references"] if one),
                                document["text"]])}
            for document in lessons.documents
        ],
        **{f"heldout_{name}": lines for name, lines in score_lines(groups[: options.heldout]).items()},
        **{f"calibration_{name}": lines for name, lines in score_lines(groups[options.heldout :]).items()},
    }
    told = [document["text"] for document in lessons.documents]
    counts = {f"{name} lines": len(lines) for name, lines in texts.items()} | {
        "entries taught": len(taught),
        "entries never asked": sum(not lessons.asked[entry.id] for entry in taught),
        "documents too short": lessons.short,
        "lines asked": lessons.asked.total(),
        "entries held out": sum(map(len, groups)),
        "long references": sum(len(one.entries) > 1 for one in references),
        "reference tokens": check_tokens([one.text for one in references], options.reference_length, tokenizer),
        "document tokens": check_tokens(told, options.document_tokens - 1, tokenizer) + len(told),
        "tokens of room": options.document_tokens * len(told),
    }
    return texts, counts


def run(options: Options, corpus: Path = CORPUS) -> None:
    """Write the texts; nothing is done when they are there already, made with the same options."""
    from megatron_m3.tokenizer import Tokenizer

    output, tokenizer = Path(options.output), Tokenizer.load(options.tokenizer)
    more = read_entries(options.entries, options.longest_gloss)
    inputs = {"corpus": hash_file(corpus / "entries.jsonl.gz")["sha256"], "tokenizer": tokenizer.hash} | {
        f"entries {place}": hash_file(Path(name))["sha256"] for place, name in enumerate(options.entries)
    }
    left = ("output", "tokenizer", "entries")
    settings = {name: value for name, value in json.loads(json.dumps(asdict(options))).items() if name not in left}
    if is_finished(output, KIND, SCHEMA, inputs, settings):
        print(f"{output}: made already")
        return
    texts, counts = make_texts(load_entries(corpus, options.longest_gloss), more, tokenizer, options)
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs=inputs, settings=settings, files={}, info=counts)
    write_texts(output, texts, manifest)
    show_counts("lessons", counts)
    print(output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``m3 data lessons``."""
    run(parse(Options, argv, "m3 data lessons", __doc__ or ""))


if __name__ == "__main__":
    exit_on_user_error(main)
