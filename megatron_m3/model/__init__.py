"""The model on megatron-core. Call ``platform.select()`` before importing this package's modules."""
