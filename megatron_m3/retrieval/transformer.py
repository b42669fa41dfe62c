"""The neural embedder: any sentence-transformers model, such as BGE-M3, by path or hub name.

The model stays where it is; the embedder's folder names it, says how it is used (pooling, length, prompts) and holds
its fingerprint. The library sentence-transformers reads the model's own configuration and computes its modules; batches
are ours, of a number of tokens instead of a number of texts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import Manifest, atomic_folder, write_manifest
from megatron_m3.retrieval.embedder import KIND, SCHEMA, Role, normalise
from megatron_m3.retrieval.sentence_model import (
    find_model,
    fingerprint,
    load_model,
    pooling_of,
    set_max_length,
    set_pooling,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NAME = "sentence_transformer"
"""Kind of embedder, in its manifest."""
TOKENS_IN_BATCH = {"cpu": 2048, "cuda": 32768}
"""A CPU is fastest while what a layer computes stays in its cache; a GPU, when it is full."""
TEXTS = 2048
"""Texts that are put in order of length at a time."""


class TransformerEmbedder:
    """Embeds as the model's own configuration says, but for what was chosen otherwise when it was named."""

    def __init__(self, manifest: Manifest) -> None:
        """Load the model that ``manifest`` names, onto the platform's device.

        Raises:
            ArtifactError: it is no longer the model that the references were embedded with.
        """
        from megatron_m3.platform import select

        settings = manifest.settings
        self.hash, self.size, self.prompts = manifest.hash, settings["size"], settings["prompts"]
        model = load_model(settings["model"], settings["dtype"])
        if settings["pooling"] is not None:
            set_pooling(model, settings["pooling"])
        set_max_length(model, settings["max_length"])
        if fingerprint(model) != settings["fingerprint"]:
            raise ArtifactError(
                f"{settings['model']}: its weights, vocabulary or modules changed since the references were embedded "
                "with it; restore the model, or embed the references again"
            )
        self.model = model.to(select().device)

    def embed(self, texts: Sequence[str], role: Role = "document") -> np.ndarray:
        """Vectors of ``texts``, float32 [N, size], of length 1; computed in batches of similar length."""
        vectors = np.zeros((len(texts), self.size), np.float32)
        for start in range(0, len(texts), TEXTS):
            chosen = list(texts[start : start + TEXTS])
            vectors[start : start + len(chosen)] = compute(self.model, chosen, self.prompts[role], role)
        return normalise(vectors)


def compute(model: "SentenceTransformer", texts: list[str], prompt: str, role: Role) -> np.ndarray:
    """The model's vectors of ``texts``, float32 [N, size], of any length."""
    import torch

    features = model.preprocess(texts, prompt=prompt, task=role)
    rows, parts = [], []
    with torch.inference_mode():
        for chosen, batch in batches(features, len(texts), TOKENS_IN_BATCH[model.device.type]):
            moved = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                     for name, value in batch.items()}
            rows.append(chosen)
            parts.append(model(moved, task=role)["sentence_embedding"][:, : model.truncate_dim])
        computed = torch.cat(parts).float().cpu().numpy()
    vectors = np.empty_like(computed)
    vectors[np.concatenate(rows)] = computed
    return vectors


def batches(features: dict[str, Any], count: int, most_tokens: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Batches of the ``features`` of ``count`` texts, longest first: the rows, and their features without the padding
    that none of them needs. What padding is left counts towards ``most_tokens``; a longer text is a batch of its own.
    """
    import torch

    mask = features.get("attention_mask")
    if mask is None or mask.shape[0] != count:  # of a model that knows no padding
        yield np.arange(count), features
        return
    lengths = mask.sum(1).numpy()
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < count:
        rows = order[start : start + max(1, most_tokens // max(1, int(lengths[order[start]])))]
        start += len(rows)
        used = mask[rows].any(0)
        batch = dict(features)
        for name, value in features.items():
            if isinstance(value, torch.Tensor) and value.shape[:1] == (count,):
                batch[name] = value[rows][:, used] if value.shape[1:2] == used.shape else value[rows]
        yield rows, batch


def make_transformer(
    name: str,
    folder: Path,
    *,
    pooling: str = "auto",
    max_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    dtype: str = "float32",
) -> None:
    """Write the embedder folder that names a model.

    Args:
        name: the model's folder or hub name.
        folder: to write.
        pooling: auto for what the model says, or what to do instead.
        max_length: tokens that longer texts are cut to; None for what the model says.
        query_prompt: is put before a text that asks; None for what the model says.
        document_prompt: is put before a reference; None for what the model says.
        dtype: of weights and activations.

    Raises:
        ConfigError: there is no such model, or it cannot do what is asked.
    """
    found = find_model(name)
    model = load_model(name, dtype)
    if pooling != "auto":
        set_pooling(model, pooling)
    elif not (found / "modules.json").is_file():
        raise ConfigError(f"pooling=auto: {name} does not say how it pools, it has no modules.json; give pooling=cls "
                          "for BGE-M3, mean for most others")
    pooled = pooling_of(model)
    settings = {
        "kind": NAME,
        "model": str(found) if Path(name).is_dir() else name,
        "pooling": None if pooled is None else pooled.pooling_mode,
        "max_length": set_max_length(model, max_length),
        "prompts": {"query": own_prompt(model, "query") if query_prompt is None else query_prompt,
                    "document": own_prompt(model, "document", "passage", "corpus") if document_prompt is None
                    else document_prompt},
        "dtype": dtype,
        "size": compute(model, ["size"], "", "document").shape[1],
        "fingerprint": fingerprint(model),
    }
    with atomic_folder(folder) as temporary:
        write_manifest(temporary, Manifest(kind=KIND, schema=SCHEMA, inputs={}, settings=settings, files={}))


def own_prompt(model: "SentenceTransformer", *names: str) -> str:
    """The first of the model's prompts of these names that is not empty."""
    return next((prompt for name in names if (prompt := model.prompts.get(name))), "")
