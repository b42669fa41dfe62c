"""Every setting of a training run: one keyword-only dataclass per section, a docstring under each field.

The command line, the help texts and the files written beside results are all made from these classes.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_m3.config.checks import check_positive, check_range
from megatron_m3.config.model import MemoryConfig, ModelConfig
from megatron_m3.config.parallel import ParallelConfig, check_parallel
from megatron_m3.errors import ConfigError

MAX_SEED = 2**31 - 1
"""Largest seed that every random stream takes."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data: where it lies and how it is loaded."""

    tokens: str = ""
    """Folder of the tokenized corpus (Megatron .bin/.idx), made by `m3 data tokenize`."""
    references: str = ""
    """Folder of the knowledge base, made by `m3 data references`; needed by the continual stage."""
    neighbours: str = ""
    """Folder of each chunk's neighbours, made by `m3 data neighbours`; needed by the continual stage."""
    tokenizer: str = ""
    """Folder of the tokenizer, made by `m3 data tokenizer`."""
    sequence_length: int = 2048
    """Tokens in a training sequence (references not counted); a multiple of memory.chunk_length."""
    loader: Literal["torch", "dali"] = "torch"
    """Loader that reads ahead: torch's DataLoader or NVIDIA DALI; both give the same batches."""
    prefetch: int = 4
    """Batches read ahead."""
    references_per_sequence: int = 0
    """Most references that are encoded for a sequence; chunks that come after them go without. 0 is one for every
    chunk; fewer save the work on chunks that have none."""
    encode_once: bool = True
    """Encode a reference once for all chunks of a micro-batch that read it; loss and gradients stay the same."""
    expected_repeats: float = 0.0
    """Share of the references that plans take not to be encoded: repeats, and with training.reuse_memories those that
    are reused; the step line tells both shares."""
    max_overlap: float = 0.9
    """References with a larger overlap (eq. 6) with the training sequence are dropped."""
    seed: int = 1234
    """Order of the training sequences."""

    def __post_init__(self) -> None:
        check_range("data", self, 1, math.inf, "sequence_length", "prefetch")
        check_range("data", self, 0, 1, "max_overlap", "expected_repeats")
        if self.expected_repeats and not self.encode_once:
            raise ConfigError(f"data.expected_repeats={self.expected_repeats}: needs data.encode_once=true")
        check_range("data", self, 0, math.inf, "references_per_sequence")
        check_range("data", self, 0, MAX_SEED, "seed")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with states in fp32."""

    lr: float = 4e-4
    """Highest learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms are exempt."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        check_positive("optimizer", self, "lr")
        check_range("optimizer", self, 0, math.inf, "weight_decay", "epsilon", "clip_grad")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: must be from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule over training.steps (section 5)."""

    style: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: linear rise, flat, fast decay at the end; cosine: linear rise, half a cosine; constant: rise, flat."""
    warmup_fraction: float = 0.01
    """Share of the steps over which the rate rises linearly."""
    decay_fraction: float = 0.1
    """Share of the steps, at the end, over which wsd decays."""
    min_ratio: float = 0.01
    """Rate at the end, as a share of optimizer.lr."""

    def __post_init__(self) -> None:
        check_range("schedule", self, 0, 1, "warmup_fraction", "decay_fraction", "min_ratio")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop: how long, how much at once, how precise."""

    stage: Literal["warmup", "continual"] = "warmup"
    """warmup: ordinary pretraining; continual: references are encoded in the same pass and read (sections 3.5, 5)."""
    steps: int = 100
    """Optimizer steps."""
    global_batch: int = 8
    """Sequences in an optimizer step, over all processes."""
    micro_batch: int = 1
    """Sequences in one forward pass of one process."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations; optimizer states are fp32 in either case."""
    seed: int = 1234
    """Initial weights and dropout."""
    output: str = ""
    """Folder of the run: checkpoints, metrics, resolved config."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Modules of a layer while it is trained: local (megatron-core's own), or transformer_engine (its linear layers,
    two of them one kernel with the norm before them, on CUDA; never run on a card yet). Checkpoints are the same."""
    frozen_layers: int = 0
    """Lowest layers whose weights stay as they are; from 1 on the embedding (and an output tied to it) does too."""
    reference_gradient_every: int = 1
    """Steps from one whose gradient flows through the references to the next; in those between them memories are
    read as they are, and their references have no backward pass. 0: in no step."""
    reuse_memories: int = 0
    """Steps in which a memory is read once it is written, instead of encoding its reference again; it is then as old as
    that, and has no gradient. 1: in the later micro-batches of its own step alone; 0: each is encoded anew."""
    reuse_bytes: int = 2**30
    """Most bytes of memories that a process holds for that; those that were not read for longest go first."""
    init_from: str = ""
    """Checkpoint whose weights the run starts from (continual starts from a warmup checkpoint)."""

    def __post_init__(self) -> None:
        check_range("training", self, 1, math.inf, "steps", "global_batch", "micro_batch")
        check_range("training", self, 0, MAX_SEED, "seed")
        check_range("training", self, 0, math.inf, "frozen_layers", "reference_gradient_every",
                    "reuse_memories", "reuse_bytes")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: model, optimizer, schedule, RNG and data position, for any parallel layout."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    resume: bool = True
    """Go on from the newest checkpoint in training.output, if there is one."""

    def __post_init__(self) -> None:
        check_range("checkpoint", self, 1, math.inf, "every")
        check_range("checkpoint", self, 0, math.inf, "keep")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Divergence guard: what counts as divergence, and what is done about it."""

    enabled: bool = True
    """Watch the loss and the gradient norm."""
    spike_factor: float = 2.0
    """The loss diverges when it exceeds its running mean by this factor..."""
    spike_steps: int = 3
    """...for this many steps in a row; a non-finite value counts at once."""
    norm_spike_factor: float = 10.0
    """A gradient norm that exceeds its running mean by this factor counts as a spike of the loss."""
    min_history: int = 20
    """Steps before spikes are judged."""
    lr_factor: float = 0.5
    """The learning rate is multiplied by this after each return to a checkpoint."""
    max_rollbacks: int = 5
    """The run stops with an error after this many returns."""

    def __post_init__(self) -> None:
        check_range("guard", self, 1, math.inf, "spike_factor", "norm_spike_factor", "spike_steps")
        check_range("guard", self, 0, math.inf, "min_history", "max_rollbacks")
        check_range("guard", self, 0, 1, "lr_factor")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is printed and recorded."""

    every: int = 1
    """Steps between step lines."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    peak_tflops: float = 0.0
    """The device's peak TFLOP/s for MFU; 0 is its maker's figure for a known GPU in bf16, else the rate of a large
    matrix product, measured at start."""

    def __post_init__(self) -> None:
        check_range("logging", self, 1, math.inf, "every")
        check_range("logging", self, 0, math.inf, "peak_tflops")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. A recipe returns one; overrides change single fields."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        self.memory.memory_heads(self.model.num_layers, self.model.num_kv_heads)
        if self.data.sequence_length % self.memory.chunk_length:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length}: must be a multiple of "
                f"memory.chunk_length={self.memory.chunk_length}"
            )
        if self.training.reuse_memories and not self.data.encode_once:
            raise ConfigError(f"training.reuse_memories={self.training.reuse_memories}: needs data.encode_once=true")
        check_parallel(self)

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Layers that hold explicit memory, ascending, counted from 0."""
        return self.memory.memory_layers(self.model.num_layers)

    @property
    def memory_heads(self) -> dict[int, tuple[int, ...]]:
        """Key-value heads that hold explicit memory, ascending, by memory layer."""
        return self.memory.memory_heads(self.model.num_layers, self.model.num_kv_heads)

    @property
    def num_references(self) -> int:
        """References that are encoded for a training sequence of the continual stage."""
        chunks = self.data.sequence_length // self.memory.chunk_length
        return min(self.data.references_per_sequence or chunks, chunks)

    @property
    def reuses_memories(self) -> bool:
        """Whether training holds memories for later steps."""
        return self.training.reuse_memories > 0 and self.training.stage == "continual"
