"""The two sides of a verification: our model at some layout, or transformers' own, both computing in fp32."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckpt_convert.checkpoint_source import CheckpointSource
from ckpt_convert.families import write_config
from ckpt_convert.sources import Source, open_model
from megatron_m3.errors import ConfigError
from megatron_m3.platform import select


class Side(ABC):
    """One model under comparison. What has to do with our processes is a collective; results are the first one's."""

    source: Source
    """Its tensors."""

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits ``[S, V]`` of every position; on other processes than the first maybe empty."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids without special tokens; None where it has no tokenizer."""

    @abstractmethod
    def exchange_gate_and_up(self) -> None:
        """Break the model as a wrong mapping would."""

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` likeliest tokens after ``prompt``, each after all before it."""
        tokens = list(prompt)
        for _ in range(count):
            logits_SV = self.logits(tokens)
            tokens.append(first_rank(int(logits_SV[-1].argmax()) if is_first() else 0))
        return tokens[len(prompt) :]


def is_first() -> bool:
    """Whether this process compares and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_rank[T](value: T) -> T:
    """The first process's ``value``, on all."""
    held: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held, src=0)
    found: T = held[0]
    return found


def open_side(path: Path, tensor: int, pipeline: int) -> Side:
    """Load a model for comparison; ours is laid over ``tensor`` times ``pipeline`` processes."""
    source = open_model(path)
    if isinstance(source, CheckpointSource):
        return OurSide(source, tensor, pipeline)
    return TheirSide(source)


class TheirSide(Side):
    """A Hugging Face folder or a GGUF file in transformers, on the first process."""

    def __init__(self, source: Source) -> None:
        self.source, path = source, source.path
        self.place: dict[str, Any] = {"pretrained_model_name_or_path": str(path), "local_files_only": True}
        if path.is_file():
            self.place |= {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self.model: Any = None
        if is_first():
            from transformers import AutoConfig, AutoModelForCausalLM

            known = {}
            if path.is_file():
                # of a GGUF file transformers overlooks the head size of Qwen3 and the RoPE scaling of Llama 3
                fields = write_config(source.model, source.family, "float32", source.model.max_positions, {})
                known["config"] = AutoConfig.for_model(**fields)
            self.model = AutoModelForCausalLM.from_pretrained(**self.place, **known, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """See :class:`Side`."""
        return self.model(torch.tensor([tokens])).logits[0] if is_first() else torch.empty(0)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """See :class:`Side`; with transformers' own cache."""
        found: list[int] = []
        if is_first():
            step, cache = torch.tensor([list(prompt)]), None
            for _ in range(count):
                out = self.model(step, past_key_values=cache, use_cache=True)
                step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                found.append(int(step))
        return first_rank(found)

    def encode(self, texts: Sequence[str]) -> list[list[int]] | None:
        """See :class:`Side`."""
        if self.source.path.is_dir() and not (self.source.path / "tokenizer.json").is_file():
            return None
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(**self.place)
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def exchange_gate_and_up(self) -> None:
        """See :class:`Side`."""
        if is_first():
            for layer in self.model.model.layers:
                layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


class OurSide(Side):
    """One of our checkpoints in our model, laid over all processes."""

    def __init__(self, source: CheckpointSource, tensor: int, pipeline: int) -> None:
        from megatron_m3.model.checkpoint import load_model

        self.source = source
        self.loaded = load_model(source.path, tensor=tensor, pipeline=pipeline, dtype="fp32")
        world = dist.get_world_size()
        if world != tensor * pipeline:
            raise ConfigError(f"tensor={tensor}: with pipeline={pipeline} that is {tensor * pipeline} processes, "
                              f"there are {world}; start that many with torchrun")
        self.last_stage = world - world // pipeline

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """See :class:`Side`."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_m3.inference.reading import ReadingPlan
        from megatron_m3.model.rope import Rope
        from megatron_m3.ops.choice import choose_backend

        shape, device = self.loaded.config.model, select().device
        tokens_BS = torch.tensor([list(tokens)], device=device)
        plan = ReadingPlan(Rope.of(shape), torch.arange(len(tokens), device=device),
                           backend=choose_backend(shape).name)

        def step(batches: object, stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            out = stage(tokens_BS, None, None, extra_block_kwargs={"attention_bias": plan}, runtime_gather_output=True)
            return out, lambda out, non_loss_data: out

        found = get_forward_backward_func()(
            forward_step_func=step, data_iterator=iter(()), model=[self.loaded.model], num_microbatches=1,
            seq_length=len(tokens), micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            found = [torch.empty(1, len(tokens), shape.padded_vocab_size, device=device)]
        dist.broadcast(found[0], src=self.last_stage)
        return found[0][0, :, : shape.vocab_size].cpu()

    def encode(self, texts: Sequence[str]) -> list[list[int]] | None:
        """See :class:`Side`."""
        return self.loaded.tokenizer.encode_batch(texts)

    @torch.no_grad()
    def exchange_gate_and_up(self) -> None:
        """See :class:`Side`."""
        for name, parameter in self.loaded.model.named_parameters():
            if "linear_fc1.weight" in name:
                parameter.copy_(torch.cat(parameter.chunk(2)[::-1]))
