"""Explicit memory: encoding, codec, the bank on disk, the cache in RAM, and sources that serve memories by id."""

from megatron_m3.memory.bank import MemoryBank
from megatron_m3.memory.cache import MemoryCache
from megatron_m3.memory.codec import Codec
from megatron_m3.memory.codecs import load_codec, train_codec
from megatron_m3.memory.cold import ColdMemories
from megatron_m3.memory.encode import encode_references, encode_variants
from megatron_m3.memory.sensitivity import measure_sensitivity
from megatron_m3.memory.sources import ColdSource, Delivery, MemorySource, ReadCounts, WarmSource
from megatron_m3.memory.types import ExplicitMemories, held_lists

__all__ = [
    "Codec",
    "ColdMemories",
    "ColdSource",
    "Delivery",
    "ExplicitMemories",
    "MemoryBank",
    "MemoryCache",
    "MemorySource",
    "ReadCounts",
    "WarmSource",
    "encode_references",
    "encode_variants",
    "held_lists",
    "load_codec",
    "measure_sensitivity",
    "train_codec",
]
