"""Selection of the tokens that an explicit memory keeps."""

from megatron_m3.ops.select_tokens.choice import select_tokens
from megatron_m3.ops.select_tokens.reference import token_weights

__all__ = ["select_tokens", "token_weights"]
