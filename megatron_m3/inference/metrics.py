"""What a service counts, as Prometheus reads it."""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from megatron_m3.inference.generation import Statistics

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
WINDOW = 10.0
"""Seconds over which the pace is taken."""
PHASES = ("prefill", "decode", "retrieval", "fetch")


class Metrics:
    """Counters since the start, and gauges of now."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._steps: deque[tuple[float, int]] = deque()
        self.requests = Counter("m3_requests", "Requests for completions by HTTP status; 499: the client had gone.",
                                ["status"], registry=self._registry)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens read.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self.steps = self._counter("steps", "Passes of the model that gave tokens.")
        self.memories_read = self._counter("memories_read", "References that chunks read.")
        self.cache_hits = self._counter("memory_cache_hits", "Memories found in RAM or on the device.")
        self.cache_misses = self._counter("memory_cache_misses", "Memories read from the bank or written by the model.")
        self.seconds = Counter("m3_seconds", "Seconds spent generating, by phase.", ["phase"], registry=self._registry)
        self.waiting = Gauge("m3_waiting_prompts", "Prompts that wait in line.", registry=self._registry)
        self.running = Gauge("m3_batch_size", "Prompts that are continued together now.", registry=self._registry)
        pace = Gauge("m3_tokens_per_second", f"Tokens generated in a second, over the last {WINDOW:.0f}.",
                     registry=self._registry)
        pace.set_function(self.tokens_per_second)
        self.request_seconds = Histogram("m3_request_seconds", "From a prompt's arrival to its last token.",
                                         buckets=SECONDS, registry=self._registry)
        self.first_token_seconds = Histogram("m3_first_token_seconds", "From a prompt's arrival to its first token.",
                                             buckets=SECONDS, registry=self._registry)

    def _counter(self, name: str, explanation: str) -> Counter:
        return Counter(f"m3_{name}", explanation, registry=self._registry)

    def count(self, statistics: Statistics, tokens: int) -> None:
        """Count a pass that gave ``tokens``."""
        now = time.monotonic()
        self._steps.append((now, tokens))
        while self._steps[0][0] < now - WINDOW:
            self._steps.popleft()
        self.steps.inc()
        self.generated_tokens.inc(tokens)
        self.prompt_tokens.inc(statistics.prompt_tokens)
        self.memories_read.inc(statistics.references_read)
        self.cache_hits.inc(statistics.cache_hits)
        self.cache_misses.inc(statistics.cache_misses)
        for phase in PHASES:
            self.seconds.labels(phase).inc(getattr(statistics, f"{phase}_seconds"))

    def tokens_per_second(self) -> float:
        """Pace of the last seconds."""
        since = time.monotonic() - WINDOW
        return sum(tokens for when, tokens in list(self._steps) if when >= since) / WINDOW

    def value(self, name: str) -> float:
        """One counter or gauge without labels, by its name in the text."""
        return self._registry.get_sample_value(name) or 0.0

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)
