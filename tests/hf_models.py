"""Tiny random models of every family, saved by transformers itself, with a tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_m3.tokenizer import train_tokenizer
from tests.tiny_model import sentence

SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 515, "max_position_embeddings": 256,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "llama3 tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False,
                "num_key_value_heads": 4},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 12},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
"""Changes to :data:`SIZES`, by name: heads wider than hidden / heads, a vocabulary that is no multiple of anything."""


def make_tokenizer(folder: Path) -> None:
    """A trained tokenizer as a Hugging Face folder has it, with a chat template."""
    train_tokenizer([sentence(seed, 200) for seed in range(20)], 512, folder / "made")
    shutil.copyfile(folder / "made" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "made")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }))


def make_model(folder: Path, case: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB",
               **changes: Any) -> Path:
    """Save a random model; every weight matters, biases and norms too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = SIZES | CASES[case] | changes
    torch.manual_seed(sum(case.encode()))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + ("norm" in name))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(folder)
    return folder
