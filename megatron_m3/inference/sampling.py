"""The next token of every sequence: greedy, or drawn from a random stream that each prompt has to itself."""

import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_m3.errors import ConfigError

MIN_TEMPERATURE = 1e-3
"""Below it a division of the logits can overflow, and the draw is the likeliest token anyway."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Random stream; a prompt's tokens depend on it and on the prompt, never on its batch."""

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not MIN_TEMPERATURE <= self.temperature <= sys.float_info.max:
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must be 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How one sequence's next tokens are chosen."""

    sampling: Sampling
    stream: np.random.Generator
    """Its random numbers; one is drawn for each token unless greedy."""


def draws(sampling: Sampling, prompts: Sequence[Sequence[int]]) -> list[Draw]:
    """One :class:`Draw` a prompt. Equal prompts in one call get different streams."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = zlib.crc32(np.asarray(key, dtype=np.int64).tobytes())
        stream = np.random.default_rng([sampling.seed, digest, len(key), seen[key]])
        found.append(Draw(sampling=sampling, stream=stream))
        seen[key] += 1
    return found


def choose(logits_BV: Tensor, draw_of: Sequence[Draw]) -> Tensor:
    """The next token ids, int64 [B], each as its sequence's draw says; -1 where a logit is no number or infinite."""
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, draw in enumerate(draw_of):
        settings = draw.sampling
        groups.setdefault((settings.temperature, settings.top_k, settings.top_p), []).append(row)
    if len(groups) == 1:
        return _choose_alike(logits_BV, draw_of)
    token_B = torch.empty(len(draw_of), dtype=torch.long, device=logits_BV.device)
    for rows in groups.values():
        token_B[rows] = _choose_alike(logits_BV[rows], [draw_of[row] for row in rows])
    return token_B


def _choose_alike(logits_BV: Tensor, draw_of: Sequence[Draw]) -> Tensor:
    sampling = draw_of[0].sampling
    if sampling.temperature == 0.0:
        # the CPU has a fast argmax for fp32 alone
        token_B = logits_BV.float().argmax(-1)
        return token_B.where(logits_BV.gather(-1, token_B[:, None])[:, 0].isfinite(), -1)
    whole_BV = (logits_BV.double() / float(sampling.temperature)).softmax(-1)
    probability_BV, token_BV = whole_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        probability_BV[:, sampling.top_k :] = 0
        probability_BV /= probability_BV.sum(-1, keepdim=True)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    probability_BV[before_BV >= sampling.top_p] = 0
    cumulative_BV = probability_BV.cumsum(-1)
    drawn = torch.tensor([[draw.stream.random()] for draw in draw_of], dtype=torch.float64)
    target_B1 = drawn.to(cumulative_BV.device) * cumulative_BV[:, -1:]
    rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    rank_B1 = rank_B1.minimum((probability_BV > 0).sum(-1, keepdim=True) - 1)
    drawn_B = token_BV.gather(1, rank_B1.clamp_min(0))[:, 0]
    return drawn_B.where(probability_BV[:, 0].isfinite(), -1)
