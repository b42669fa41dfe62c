"""A sentence-transformers model: where it lies, how it is loaded and set, and what tells it from another.

Only files on this machine are loaded, and no code of a model's own is run; a hub name is fetched when it is not in the
cache of Hugging Face.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m3.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

PROBE = "The Qu\u00edck  brown F\u00d3X, \u732b\u304c\u597d\u304d! \ufb01 42\n\u00df"
"""A text on which tokenizers differ that treat case, accents, spaces or scripts differently."""
OTHER_FORMATS = ("*.onnx*", "onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot")


def find_model(name: str) -> Path:
    """The folder of a model given by folder or hub name (OWNER/NAME), fetched if it is nowhere on this machine.

    Raises:
        ConfigError: there is none.
    """
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name).resolve()
    if name.count("/") != 1 or name.startswith("/"):
        raise ConfigError(f"model={name}: no such folder, and not a hub name (OWNER/NAME); give the model's folder")
    with contextlib.suppress(OSError, ValueError):
        return Path(snapshot_download(name, local_files_only=True))
    try:
        return Path(snapshot_download(name, ignore_patterns=list(OTHER_FORMATS)))
    except Exception as error:  # of whichever library carries the request
        raise ConfigError(f"model={name}: no such folder, not in the cache of Hugging Face, and not to be had from its "
                          f"hub ({type(error).__name__}); give the model's folder") from None


def load_model(name: str, dtype: str) -> "SentenceTransformer":
    """The model, on the CPU, ready to embed.

    Raises:
        ConfigError: there is none, or it cannot be loaded here.
    """
    folder = find_model(name)
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True,
                                    model_kwargs={"dtype": getattr(torch, dtype)})
    except (OSError, ValueError, ImportError, AttributeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model={name}: not a model that can be loaded here ({reason}); give the folder of a "
                          "sentence-transformers model") from None
    return model.eval()


def pooling_of(model: "SentenceTransformer") -> "Pooling | None":
    """The module that makes one vector of those of the tokens; None for a model that has none."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    return next((module for module in model if isinstance(module, Pooling)), None)


def set_pooling(model: "SentenceTransformer", mode: str | list[str]) -> None:
    """Have the model pool by ``mode``, or by several whose results are joined.

    Raises:
        ConfigError: it has no pooling, or what comes after it expects another number of numbers.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    old = pooling_of(model)
    if old is None:
        raise ConfigError(f"pooling={mode}: the model does no pooling; leave it at auto")
    new = Pooling(old.embedding_dimension, mode, include_prompt=old.include_prompt)
    if new.pooling_output_dimension != old.pooling_output_dimension:
        raise ConfigError(f"pooling={mode}: the model joins {', '.join(old.pooling_mode)}; leave it at auto")
    name = next(name for name, module in model.named_children() if module is old)
    model.add_module(name, new)


def set_max_length(model: "SentenceTransformer", length: int | None) -> int:
    """Have the model cut texts to ``length`` tokens, by default to as many as it says; returns the number.

    Raises:
        ConfigError: it cannot take so many, or does not say how many it can take.
    """
    most = min(positions(model), length or model.max_seq_length or positions(model))
    if length is not None and length > most:
        raise ConfigError(f"max_length={length}: the model takes at most {most} tokens")
    if most >= 1 << 30:
        raise ConfigError("max_length: the model does not say how many tokens it can take; give a number")
    model.max_seq_length = int(most)
    return int(most)


def positions(model: "SentenceTransformer") -> int:
    """Tokens that the model has positions for; 2^30 if it sets no limit."""
    import torch

    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):  # those of RoBERTa begin after the padding id
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    config = getattr(model.transformers_model, "config", None)
    return getattr(config, "max_position_embeddings", None) or 1 << 30


def fingerprint(model: "SentenceTransformer") -> str:
    """SHA-256 over the weights, what the tokenizer makes of texts, and the modules with their settings."""
    digest = hashlib.sha256(json.dumps(list(_parts(model))).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes(weight))
    return digest.hexdigest()


def _parts(model: "SentenceTransformer") -> Iterator[Any]:
    features = model.preprocess([PROBE])
    yield {name: _bytes(value).hex() for name, value in features.items() if hasattr(value, "numpy")}
    get_vocab = getattr(model.tokenizer, "get_vocab", None)
    yield sorted(get_vocab().items()) if get_vocab else None
    for module in list(model)[1:]:
        yield type(module).__name__, getattr(module, "get_config_dict", dict)()


def _bytes(tensor: Any) -> bytes:
    import torch

    data: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data
