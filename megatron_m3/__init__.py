"""Memory³ on megatron-core: language models that read explicit memories from disk."""

__version__ = "0.1.0"
