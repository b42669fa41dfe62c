"""Settings of a bank build."""

import math
from dataclasses import dataclass

from megatron_m3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """What to write, from what, and how it is compressed."""

    checkpoint: str
    """Checkpoint, or the folder of a run, whose newest one is taken."""
    references: str
    """Folder of the knowledge base, made by `m3 data references`."""
    output: str
    """Folder of the bank; an unfinished one goes on."""
    codec: str = "auto"
    """auto (KLT at the paper's 14 bytes a vector, or fp8 where the sample is small); none; fp8; KLT and the bytes of a
    key and value together, such as KLT20; or a FAISS factory string such as OPQ20_80,Residual2x14,PQ8x10."""
    codec_from: str = ""
    """Folder of a bank whose codec is taken instead of a new one; two banks can be merged if they share it."""
    codec_sample: int = 1024
    """References, drawn uniformly, that the codec is trained on."""
    codec_shared: bool = False
    """One codebook for keys and values together instead of one for each."""
    seed: int = 0
    """Draw of the codec's sample."""
    memory_layers: str | None = None
    """Memory layers instead of the checkpoint's: first-half, all, or ranges such as 8-24."""
    memory_heads: str | None = None
    """Memory heads instead of the checkpoint's: all, or those of each memory layer, such as 8:0,2;9:1."""
    memory_tokens: str | None = None
    """Kept tokens instead of the checkpoint's: a number, or all."""
    block_size: int = 1024
    """References in a shard, the piece of work of a rank."""
    batch_tokens: int = 8192
    """Most tokens, padding included, in one forward pass."""
    tensor_parallel: int = 1
    """Consecutive ranks that hold one model together; last bits of a bank depend on it."""
    plan: bool = False
    """Print what the build would take (bytes, FLOPs, time) and write nothing; under mpiexec, for that many ranks."""
    plan_tflops: float = 0.0
    """With --plan: TFLOP/s of a rank's hardware in a large matrix product; 0 measures this machine's in 0.3 s."""
    plan_utilisation: float = 0.5
    """With --plan: share of that rate that encoding is taken to reach."""
    json: bool = False
    """With --plan: print JSON."""

    def __post_init__(self) -> None:
        for name in ("codec_sample", "block_size", "batch_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.plan_tflops < math.inf:
            raise ConfigError(f"plan_tflops={self.plan_tflops}: must be 0 or more, and finite")
        if not 0 < self.plan_utilisation <= 1:
            raise ConfigError(f"plan_utilisation={self.plan_utilisation}: must be above 0 and at most 1")
        if self.json and not self.plan:
            raise ConfigError("json: only a plan is printed as JSON; add --plan")
        if self.codec_from and self.codec != "auto":
            raise ConfigError("codec: given by --codec-from; leave one of them out")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be 0 or more")
