"""Text to token ids and back: byte-level BPE, or any tokenizer with a ``tokenizer.json``."""

from megatron_m3.tokenizer.extend import extend_tokenizer
from megatron_m3.tokenizer.tokenizer import Tokenizer, train_tokenizer

__all__ = ["Tokenizer", "extend_tokenizer", "train_tokenizer"]
