"""Training data: tokens and neighbours on disk, the dataset that joins them, and loaders that read ahead."""

from megatron_m3.data.dataset import TrainingDataset
from megatron_m3.data.loader import build_loader
from megatron_m3.data.neighbours import NeighbourStore
from megatron_m3.data.tokens import TokenStore

__all__ = ["NeighbourStore", "TokenStore", "TrainingDataset", "build_loader"]
