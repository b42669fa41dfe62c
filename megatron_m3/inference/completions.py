"""OpenAI's completions: what a request may ask for, and what answers it."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_m3.config import from_dict
from megatron_m3.errors import ConfigError, M3Error
from megatron_m3.inference.engine import Engine
from megatron_m3.inference.generation import Continuation
from megatron_m3.inference.sampling import Sampling

NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0,
    "logit_bias": {},
}
"""OpenAI's fields that do nothing here, and the value with which they ask for nothing."""
MAX_STOPS = 4


class RequestError(M3Error):
    """A request that cannot be answered."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        return {"error": {"message": str(self), "type": kinds.get(self.status, "invalid_request_error"),
                          "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What a stream says beside the text."""

    include_usage: bool = False
    """A last message counts the tokens."""


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """The body of a request, but for its prompts; defaults are OpenAI's."""

    model: str = ""
    """Name of the model; may be left out."""
    max_tokens: int = 16
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 among all. Not OpenAI's."""
    seed: int | None = None
    """Random stream; a new one for each request by default."""
    stop: tuple[str, ...] = ()
    """Texts before which a completion ends."""
    stream: bool = False
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    memories: bool = False
    """Show which references each chunk read. Not OpenAI's."""
    user: str = ""

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served: an engine, its name, and how much fits."""

    engine: Engine
    name: str
    context: int
    """Tokens of BOS, a prompt and its completion."""
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Names the weights."""
        return self.engine.loaded.weights_hash[:16]

    def model(self) -> dict[str, Any]:
        """One entry of OpenAI's list of models."""
        recall = self.engine.recall
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "megatron-m3",
                "max_model_len": self.context, "references": len(recall.retriever.references) if recall else 0}


def read_request(body: bytes, serving: Serving) -> tuple[CompletionRequest, list[list[int]]]:
    """A request, and its prompts as tokens.

    Raises:
        RequestError: names the field that cannot work.
    """
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeError:
        raise RequestError("body: not Unicode (not UTF-8, or half a surrogate pair)") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise RequestError("body: must be a JSON object")
    given = {name: value for name, value in fields.items() if value is not None}
    for name, neutral in NEUTRAL.items():
        if name in given and not _same(given.pop(name), neutral):
            raise RequestError(f"{name}: not supported; leave it out", param=name)
    prompts = _read_prompts(given.pop("prompt", ""), serving)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        request = from_dict(CompletionRequest, given)
        request.sampling  # noqa: B018
    except ConfigError as error:
        raise RequestError(str(error), param=str(error).partition("=")[0].partition(":")[0]) from None
    if "stream_options" in given and not request.stream:
        raise RequestError("stream_options: only of a stream; leave it out or give stream", param="stream_options")
    _check(request, prompts, serving)
    return request, prompts


def _same(value: Any, other: Any) -> bool:
    """Equal, and not a number in place of true or false."""
    return bool(value == other and isinstance(value, bool) == isinstance(other, bool))


def _read_prompts(prompt: Any, serving: Serving) -> list[list[int]]:
    """Tokens of a text, a list of texts, a list of tokens, or a list of those."""
    several = prompt if isinstance(prompt, list) and not _is_tokens(prompt) else [prompt]
    loaded = serving.engine.loaded
    if not several or not (all(isinstance(one, str) for one in several) or all(map(_is_tokens, several))):
        raise RequestError("prompt: must be a text, a list of texts, or token ids", param="prompt")
    if isinstance(several[0], str):
        return loaded.tokenizer.encode_batch(several)
    largest = loaded.config.model.vocab_size - 1
    if not all(0 <= token <= largest for one in several for token in one):
        raise RequestError(f"prompt: token ids must be from 0 to {largest}", param="prompt")
    return several


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _check(request: CompletionRequest, prompts: Sequence[Sequence[int]], serving: Serving) -> None:
    if request.model not in ("", serving.name):
        raise RequestError(f"model={request.model}: not served here; {serving.name} is", status=404, param="model",
                           code="model_not_found")
    if request.max_tokens < 1:
        raise RequestError(f"max_tokens={request.max_tokens}: must be at least 1", param="max_tokens")
    if len(request.stop) > MAX_STOPS or not all(request.stop):
        raise RequestError(f"stop: give at most {MAX_STOPS} texts, none of them empty", param="stop")
    longest = 1 + max(map(len, prompts))
    if longest >= serving.context:
        raise RequestError(f"prompt: {longest - 1:,} tokens; the context holds {serving.context:,} with BOS and the "
                           "completion; shorten it", param="prompt", code="context_length_exceeded")
    left = serving.context - longest
    if request.max_tokens > left:
        raise RequestError(f"max_tokens={request.max_tokens}: the prompt leaves {left:,} of the context's "
                           f"{serving.context:,} tokens; ask for less",
                           param="max_tokens", code="context_length_exceeded")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Puts the messages of one request together."""

    request: CompletionRequest
    serving: Serving
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def message(self, choices: Sequence[dict[str, Any]], continuations: Sequence[Continuation] = ()) -> dict[str, Any]:
        """A whole answer, or one message of a stream; with the count of the tokens of ``continuations``."""
        told = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.serving.name,
                "system_fingerprint": self.serving.fingerprint, "choices": list(choices)}
        if not continuations:
            # as OpenAI's: each message has the field if the last one fills it
            return told | ({"usage": None} if self.request.stream_options.include_usage else {})
        read = sum(len(one.prompt) for one in continuations)
        written = sum(len(one.tokens) for one in continuations)
        return told | {"usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}}

    def choice(self, index: int, text: str, reason: str | None, continuation: Continuation) -> dict[str, Any]:
        """Text of one prompt; the last one shows, if asked for, what each chunk read."""
        told = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        if reason and self.request.memories:
            told["memories"] = self.serving.engine.generation(continuation).to_dict()["chunks"]
        return told
