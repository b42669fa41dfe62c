"""What a generation returns: the text, the tokens, and which references every chunk read."""

import copy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_m3.inference.sampling import Draw
    from megatron_m3.memory import ReadCounts
    from megatron_m3.tokenizer import Tokenizer

Part = Literal["prompt", "generated"]


@dataclass(frozen=True, kw_only=True)
class ReadReference:
    """One reference that a chunk read."""

    id: int
    score: float
    """Cosine similarity of the reference and the chunk that retrieved it."""
    text: str
    kept_positions: list[list[list[int]]]
    """Which of the reference's tokens the memory keeps, by memory layer and kv head; none where the head holds none."""


@dataclass(frozen=True, kw_only=True)
class ChunkReading:
    """A chunk of the prompt or of the generated text, and what it read."""

    part: Part
    first_token: int
    """Counted from the start of its part."""
    num_tokens: int
    references: list[ReadReference]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    prompt: str
    text: str
    tokens: list[int]
    """Generated tokens, without EOS."""
    ended: bool
    """Whether EOS came, rather than the limit of tokens."""
    chunks: list[ChunkReading]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; kept positions are left out."""
        result = asdict(self)
        for chunk in result["chunks"]:
            for reference in chunk["references"]:
                del reference["kept_positions"]
        return result


@dataclass(kw_only=True, eq=False)
class Continuation:
    """A prompt that is being continued."""

    prompt: list[int]
    max_new_tokens: int
    draw: "Draw"
    tokens: list[int] = field(default_factory=list)
    """Generated so far, without EOS."""
    ended: bool = False
    """Whether EOS came."""
    dropped: bool = False
    """Whether nobody wants more of it."""
    failure: Exception | None = None
    """Why no more of it can be had; others of its batch go on."""
    read: list[tuple[Part, int, list[ReadReference]]] = field(default_factory=list)
    """Part, first token and references of each chunk."""

    @property
    def goes_on(self) -> bool:
        """Whether another token is wanted."""
        over = self.ended or self.dropped or self.failure is not None
        return not over and len(self.tokens) < self.max_new_tokens

    def afresh(self) -> "Continuation":
        """The same prompt before anything is generated; called while that is so, its draws will be the same."""
        return Continuation(prompt=self.prompt, max_new_tokens=self.max_new_tokens, draw=copy.deepcopy(self.draw))

    def generation(self, tokenizer: "Tokenizer", chunk_length: int) -> Generation:
        """What was generated so far."""
        total = {"prompt": len(self.prompt), "generated": len(self.tokens)}
        chunks = [
            ChunkReading(part=part, first_token=first, num_tokens=min(chunk_length, total[part] - first),
                         references=references)
            for part, first, references in self.read
            if first < total[part]
        ]
        return Generation(prompt=tokenizer.decode(self.prompt), text=tokenizer.decode(self.tokens), tokens=self.tokens,
                          ended=self.ended, chunks=chunks)


@dataclass(kw_only=True)
class Statistics:
    """Counts and seconds of one call of the engine."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    retrieval_seconds: float = 0.0
    """Embedding and searching."""
    fetch_seconds: float = 0.0
    """Reading, decoding or writing memories, and placing them in the cache."""
    references_read: int = 0
    cache_hits: int = 0
    """Distinct memories that were in RAM, or on the device, when a recall fetched them."""
    cache_misses: int = 0
    prefetched: int = 0
    """Memories that were read ahead."""
    prefetched_useful: int = 0
    """Of these, those that a recall fetched."""
    wait_seconds: float = 0.0
    """Part of ``fetch_seconds`` in which a recall waited for what was being read ahead."""
    total_seconds: float = 0.0
    seen: set[int] = field(default_factory=set, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens in a second of the whole call."""
        return self.generated_tokens / self.total_seconds if self.total_seconds else 0.0

    def count_reading(self, counts: "ReadCounts") -> None:
        """Add what the memory source did."""
        self.cache_hits += counts.decoded_hits + counts.record_hits
        self.cache_misses += counts.misses
        self.prefetched += counts.prefetched
        self.prefetched_useful += counts.useful
        self.wait_seconds += counts.wait_seconds

    def add(self, other: "Statistics") -> None:
        """Count another call's as well."""
        for name, value in vars(other).items():
            if name == "seen":
                self.seen |= value
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        result = {name: round(value, 6) if isinstance(value, float) else value for name, value in vars(self).items()}
        del result["seen"]
        result["prefetched_wasted"] = self.prefetched - self.prefetched_useful
        result["distinct_references"] = len(self.seen)
        return result | {"tokens_per_second": round(self.tokens_per_second, 3)}
