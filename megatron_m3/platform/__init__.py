"""CPU or CUDA, chosen once, and the processes that share the work."""

from megatron_m3.platform.platform import Platform, count_gpus, cuda_architecture, report, select

__all__ = ["Platform", "count_gpus", "cuda_architecture", "report", "select"]
