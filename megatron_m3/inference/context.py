"""How long a text a model was made for, prefix and references beside it."""

from collections.abc import Sequence

from megatron_m3.errors import ConfigError, warn
from megatron_m3.model.checkpoint import ModelDescription
from megatron_m3.model.layout import trunk_positions

BOS_AND_A_TOKEN = 2


def context_of(model: ModelDescription, *, reads_memories: bool) -> int:
    """Tokens of BOS, a text and its continuation for which a model was made or, where nobody said, trained.

    Raises:
        ConfigError: prefix and references leave no room for any.
    """
    most = model.config.model.max_positions
    if not most:
        return model.config.data.sequence_length
    prefix = len(model.prefix_ids) if reads_memories else 0
    first = int(trunk_positions(prefix, model.config.memory.reference_length, 1)[prefix])
    if most < first + BOS_AND_A_TOKEN:
        behind = f", behind {prefix} of the prefix and {first - prefix} of references" if prefix else ""
        mend = ", or read no memories (--no-memory, --mode none)" if prefix else ""
        raise ConfigError(f"model.max_positions={most}: too few for BOS and a token{behind}; take another model{mend}")
    return most - first


def warn_beyond_context(model: ModelDescription, lengths: Sequence[int], *, reads_memories: bool, mend: str) -> None:
    """Say on stderr if texts are longer than :func:`context_of`: RoPE knows no end, so that nothing else tells.

    Args:
        model: what reads the texts.
        lengths: tokens of each text, BOS and the continuation among them.
        reads_memories: whether prefix and references take positions too.
        mend: what makes them shorter.
    """
    context = context_of(model, reads_memories=reads_memories)
    beyond = [length for length in lengths if length > context]
    if beyond:
        warn(f"{len(beyond):,} of {len(lengths):,} texts take up to {max(beyond):,} tokens, more than the {context:,} "
             f"that the model was made or trained for; it may fail behind them: {mend}")
