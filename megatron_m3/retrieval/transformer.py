"""The neural embedder: a Hugging Face encoder such as BGE-M3, by path or hub name.

The model stays where it is; the embedder's folder names it, with a fingerprint of its weights and vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.manifest import Manifest, atomic_folder, write_manifest
from megatron_m3.retrieval.embedder import KIND, SCHEMA, normalise

if TYPE_CHECKING:
    import torch

TOKENS_IN_BATCH = 16384


class TransformerEmbedder:
    """Embeds by the last hidden state of the CLS token, or the mean over all tokens."""

    def __init__(self, manifest: Manifest) -> None:
        """Load the model that ``manifest`` names.

        Raises:
            ArtifactError: it is no longer the model that the references were embedded with.
        """
        settings = manifest.settings
        self.hash = manifest.hash
        self.pooling, self.max_length = settings["pooling"], settings["max_length"]
        self.model, self.tokenizer = _load(settings["model"])
        self.size: int = self.model.config.hidden_size
        if _fingerprint(self.model, self.tokenizer) != settings["fingerprint"]:
            raise ArtifactError(
                f"{settings['model']}: its weights or vocabulary changed since the references were embedded with it; "
                "restore the model, or embed the references again"
            )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of ``texts``, float32 [N, size], of length 1; computed in batches of similar length."""
        import torch

        vectors = np.zeros((len(texts), self.size), np.float32)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"] if texts else []
        order = sorted(range(len(texts)), key=lambda row: -len(encoded[row]))
        start = 0
        with torch.inference_mode():
            while start < len(order):
                rows = order[start : start + max(1, TOKENS_IN_BATCH // max(1, len(encoded[order[start]])))]
                batch = self.tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
                vectors[rows] = self._pool(batch.to(self.model.device)).float().cpu().numpy()
                start += len(rows)
        return normalise(vectors)

    def _pool(self, batch: Any) -> "torch.Tensor":
        hidden = self.model(**batch).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def make_transformer(model: str, folder: Path, *, pooling: str, max_length: int) -> TransformerEmbedder:
    """Write the embedder folder that names ``model`` (a folder or a hub name) and open it.

    Raises:
        ConfigError: there is no such model, or it cannot take ``max_length`` tokens.
    """
    loaded, tokenizer = _load(model)
    # RoBERTa's positions begin after the padding id
    offset = loaded.config.pad_token_id + 1 if "roberta" in loaded.config.model_type else 0
    most = getattr(loaded.config, "max_position_embeddings", max_length) - offset
    if max_length > most:
        raise ConfigError(f"max_length={max_length}: {model} takes at most {most} tokens")
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    settings = {"kind": "transformer", "model": model, "pooling": pooling, "max_length": max_length,
                "fingerprint": _fingerprint(loaded, tokenizer)}
    manifest = Manifest(kind=KIND, schema=SCHEMA, inputs={}, settings=settings, files={})
    with atomic_folder(folder) as temporary:
        write_manifest(temporary, manifest)
    return TransformerEmbedder(manifest)


def _load(name: str) -> tuple[Any, Any]:
    """Model in evaluation mode on the platform's device, and tokenizer."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    from megatron_m3.platform import select

    device = select().device
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model={name}: not a model that can be loaded here ({reason}); give its folder") from None
    return model.eval().to(device), tokenizer


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """SHA-256 over the weights and the vocabulary."""
    import torch

    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
