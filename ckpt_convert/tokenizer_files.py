"""The tokenizer's way with a model: from a Hugging Face folder or a GGUF file to our artifact, and back.

The artifact also carries the small files with which transformers knows the tokenizer (names of special tokens, chat
template, generation settings): training keeps the artifact as it is, so they reach ``m3 convert to-hf`` through it.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ckpt_convert.sources import read_json
from megatron_m3.errors import ArtifactError, ConfigError, UnsupportedError
from megatron_m3.manifest import Manifest, atomic_folder, hash_file, write_manifest
from megatron_m3.tokenizer import Tokenizer
from megatron_m3.tokenizer.tokenizer import FILE, KIND, SCHEMA

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
CARRIED = (FILE, CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", GENERATION)
END_OF_TEXT = "<|endoftext|>"


def find_special_tokens(folder: Path) -> dict[str, str]:
    """The model's own BOS and EOS, and under ``bos_is`` what the BOS is taken from.

    A family without BOS (Qwen) begins texts with its end-of-text token, else with its padding, else with its EOS.

    Raises:
        ArtifactError: a damaged file; no EOS is named, or one that the vocabulary lacks.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # the library has no narrower one
        raise ArtifactError(f"{folder / FILE}: not a readable tokenizer ({error}); take a complete model") from None
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        if (folder / name).is_file():
            named |= {role: value for role, value in read_json(folder / name).items() if value is not None}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}

    def token(role: str) -> str | None:
        value = named.get(f"{role}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if value is None:
            numbers = config.get(f"{role}_token_id")
            number = numbers[0] if isinstance(numbers, list) and numbers else numbers
            value = backend.id_to_token(number) if isinstance(number, int) else None
        return value if isinstance(value, str) and backend.token_to_id(value) is not None else None

    eos = token("eos")
    if eos is None:
        raise ArtifactError(f"{folder}: no EOS token in {CONFIG} or config.json; name one as eos_token")
    for source, bos in (("bos_token", token("bos")), (END_OF_TEXT, END_OF_TEXT), ("pad_token", token("pad"))):
        if bos is not None and backend.token_to_id(bos) is not None:
            return {"bos": bos, "eos": eos, "bos_is": source}
    return {"bos": eos, "eos": eos, "bos_is": "eos_token"}


def adopt_tokenizer(folder: Path, output: Path) -> Tokenizer:
    """Make our artifact ``output`` from a folder with a ``tokenizer.json``."""
    special = find_special_tokens(folder)
    with atomic_folder(output) as temporary:
        names = [name for name in CARRIED if (folder / name).is_file()]
        for name in names:
            shutil.copyfile(folder / name, temporary / name)
        write_manifest(temporary, Manifest(kind=KIND, schema=SCHEMA, inputs={}, settings=dict(special),
                                           files={name: hash_file(temporary / name) for name in names}))
    return Tokenizer.load(output)


def check_tokenizer(path: Path) -> None:
    """Refuse a model whose tokenizer we could not take over, before anything is written.

    Raises:
        UnsupportedError: a folder without ``tokenizer.json``.
    """
    if path.is_dir() and not (path / FILE).is_file():
        raise UnsupportedError(f"{path}: {FILE} is missing; save the tokenizer with transformers' save_pretrained")


def source_tokenizer(path: Path, vocab_size: int, output: Path) -> Tokenizer:
    """Make our artifact ``output`` from the tokenizer of a Hugging Face folder or of a GGUF file.

    Raises:
        ConfigError: it has more than the ``vocab_size`` tokens of the model.
    """
    tokenizer = adopt_tokenizer(path, output) if path.is_dir() else _gguf_tokenizer(path, vocab_size, output)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
                          "take a model whose files belong together")
    return tokenizer


def _gguf_tokenizer(path: Path, vocab_size: int, output: Path) -> Tokenizer:
    """Our artifact from what transformers makes of a GGUF file's tokenizer."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        tokenizer.save_pretrained(folder)
        # transformers adds its class's own special tokens where the file has none
        backend = read_json(Path(folder) / FILE)
        added = [token["content"] for token in backend["added_tokens"] if token["id"] >= vocab_size]
        backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in added]
        (Path(folder) / FILE).write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
        named = read_json(Path(folder) / CONFIG)
        kept = {name: value for name, value in named.items() if name.endswith("_token") and value not in added}
        (Path(folder) / CONFIG).write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))
        return adopt_tokenizer(Path(folder), output)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files with which transformers loads a tokenizer of ours; those it came with, if it came from there."""
    for name in tokenizer.manifest.files:
        shutil.copyfile(tokenizer.folder / name, folder / name)
    settings = tokenizer.manifest.settings
    if not (folder / CONFIG).is_file():
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": settings["bos"],
                  "eos_token": settings["eos"], "clean_up_tokenization_spaces": False}
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    if not (folder / GENERATION).is_file():
        fields = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        (folder / GENERATION).write_text(json.dumps(fields, indent=2) + "\n")
