"""A tiny model with random weights and a real tokenizer, as if loaded from a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_m3.config import Config, ParallelConfig, get_recipe, replace_fields
from megatron_m3.platform.distributed import parallel_world
from megatron_m3.platform.platform import select
from megatron_m3.tokenizer import train_tokenizer

WORDS = [
    start + end
    for start in ("am", "cor", "del", "fen", "gri", "hol", "mar", "tun")
    for end in ("ber", "dra", "ta", "x")
]


@contextmanager
def joined_world() -> Iterator[None]:
    """A world of one process for the length of a block; one that is there already is used and left alone."""
    torch.set_num_threads(1)
    select()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    with parallel_world(ParallelConfig(), seed=1):
        yield


def sentence(seed: int, num_words: int) -> str:
    """Words in an order that depends on ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[place] for place in torch.randint(len(WORDS), (num_words,), generator=generator).tolist())


def tiny_config(**overrides: str) -> Config:
    """The tiny recipe with fields replaced; ``model__num_layers="2"`` is model.num_layers."""
    return replace_fields(get_recipe("tiny"), {name.replace("__", "."): value for name, value in overrides.items()})


def tiny_model(folder: Path, std: float = 0.1, **overrides: str):
    """A LoadedModel with random weights; ``std`` is large enough that attention matters. Needs a joined world."""
    from megatron_m3.model.checkpoint import LoadedModel
    from megatron_m3.model.gpt import build_model
    from megatron_m3.model.weights_hash import weights_hash

    tokenizer = train_tokenizer([sentence(seed, 200) for seed in range(20)], 512, folder / "tokenizer")
    config = tiny_config(**{"model__init_std": str(std)} | overrides)
    model = build_model(config)[0].eval()
    return LoadedModel(
        model=model,
        config=config,
        tokenizer=tokenizer,
        weights_hash=weights_hash([model]),
        prefix_ids=tokenizer.prefix_ids(config.memory.prefix),
    )
