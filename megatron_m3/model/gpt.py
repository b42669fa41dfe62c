"""The model: megatron-core's GPTModel with planned attention, its initial weights, and its forward passes."""

import zlib

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_m3.config import Config, stage_layers
from megatron_m3.errors import ConfigError
from megatron_m3.model.attention import AttentionPlan
from megatron_m3.model.held_memories import HeldMemories, MemoryTable
from megatron_m3.model.layers import block_spec
from megatron_m3.model.layout import JointLayout
from megatron_m3.model.reference_pass import pass_references
from megatron_m3.ops.triton_support import compiler_fault
from megatron_m3.platform import select

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: Config) -> TransformerConfig:
    """The model and its parallel layout in megatron-core's terms."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.dtype]
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        transformer_impl=config.training.transformer_impl,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if parallel.interleave > 1 else None,
        pipeline_model_parallel_layout=_stage_layout(config) if parallel.pipeline > 1 else None,
        sequence_parallel=parallel.sequence,
        # stages before and after the last memory layer exchange sequences of different lengths
        variable_seq_lengths=config.training.stage == "continual",
        moe_token_dispatcher_type="alltoall",
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        # torch compiles it there, by Triton, and keeps 3 widths of the MLP for the backward pass in place of 5
        bias_activation_fusion=select().is_cuda and not compiler_fault(),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **(recompute if parallel.recompute else {}),  # type: ignore[arg-type]
    )


def _stage_layout(config: Config) -> list[list[str]]:
    """What each model chunk has, in megatron-core's words."""
    chunks = [["decoder"] * count for count in stage_layers(config)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def build_model(config: Config) -> list[GPTModel]:
    """This process's part of the model: one GPTModel, or one for each chunk of an interleaved pipeline.

    Needs :func:`megatron_m3.platform.distributed.initialize_parallel`. Parameters lie on the platform's device, and
    their initial values depend on the seed and the parameter alone, never on the parallel layout.
    """
    core = transformer_config(config)
    interleave = config.parallel.interleave
    chunks = [_build_chunk(config, core, index if interleave > 1 else None) for index in range(interleave)]
    for chunk in chunks:
        initialize_weights(chunk, config)
    return [chunk.to(torch.cuda.current_device()) for chunk in chunks]


def _build_chunk(config: Config, core: TransformerConfig, vp_stage: int | None) -> GPTModel:
    return GPTModel(
        core,
        block_spec(core, get_num_layers_to_build(core, vp_stage=vp_stage)),
        vocab_size=config.model.padded_vocab_size,
        max_sequence_length=config.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        position_embedding_type="none",
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        vp_stage=vp_stage,
    )


@torch.no_grad()
def initialize_weights(chunk: GPTModel, config: Config) -> None:
    """Draw every weight from a generator seeded by its global name, and keep this process's shard.

    Weights are normal with ``init_std``; projections into the residual stream have ``init_std / sqrt(2 * L)``; norms
    are 1, biases 0.
    """
    offset = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
    ranks, rank = config.parallel.tensor, parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in chunk.named_parameters():
        if parameter.dim() == 1:
            if name.endswith(".bias"):
                parameter.zero_()
            continue
        parts = name.split(".")
        if "layers" in parts:
            index = parts.index("layers") + 1
            parts[index] = str(int(parts[index]) + offset)
        elif name == "output_layer.weight" and config.model.tie_embeddings:
            parts = ["embedding", "word_embeddings", "weight"]
        into_residual = "linear_proj" in name or "linear_fc2" in name
        std = config.model.init_std / ((2 * config.model.num_layers) ** 0.5 if into_residual else 1.0)
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= ranks
        generator = torch.Generator().manual_seed(zlib.crc32(".".join(parts).encode()) ^ config.training.seed)
        whole = torch.empty(shape).normal_(0.0, std, generator=generator)
        if dim is None:
            shard = whole
        elif "linear_fc1" in name:
            # gate and up projections are each split over the ranks
            shard = torch.cat([half.chunk(ranks, 0)[rank] for half in whole.chunk(2, 0)])
        else:
            shard = whole.chunk(ranks, dim)[rank]
        parameter.copy_(shard)


def logits(model: torch.nn.Module, tokens_BS: Tensor, plan: AttentionPlan, vocab_size: int) -> Tensor:
    """Logits ``[B, S, vocab_size]`` of a whole model (one pipeline stage), gathered over tensor-parallel ranks."""
    out = model(tokens_BS, None, None, extra_block_kwargs={"attention_bias": plan}, runtime_gather_output=True)
    return out[..., :vocab_size]


def training_forward(
    model: torch.nn.Module, batch: dict[str, Tensor], config: Config, prefix: Tensor,
    num_kept_tokens: int | None = None, reference_gradient: bool = True, table: MemoryTable | None = None,
) -> Tensor:
    """One pass over a micro-batch: per-token losses ``[B, S]`` on the last pipeline stage, hidden states elsewhere.

    Args:
        model: this process's model chunk.
        batch: context and labels ``[B, S]``; in the continual stage also references ``[B, N, R]``, reference_lengths
            ``[B, N]`` (0 = missing) and, unless chunk c has reference c, chunk_references ``[B, C]``: which of the
            B * N each chunk has, -1 for none; with ``table`` also slots of the memories that are read from it,
            read_slots ``[H]``, which chunks count after the references, and those for the references, write_slots
            ``[B * N]``. N may then be 0.
        config: of the run.
        prefix: token ids of the prefix ``[P]``; read only where the batch has references.
        num_kept_tokens: tokens kept of a full reference, where the config's ``memory.tokens`` is not meant.
        reference_gradient: whether the gradient flows through the references.
        table: memories of earlier passes.
    """
    context, labels = batch["context"], batch["labels"]
    B, S = context.shape
    lengths = batch.get("reference_lengths")
    prefix_BP = prefix.to(context.device).expand(B, -1) if lengths is not None else context[:, :0]
    P, references = prefix_BP.shape[1], batch["references"].flatten(1) if lengths is not None else context[:, :0]
    ranks = config.parallel.tensor if config.parallel.sequence else 1
    if references.shape[1] % ranks:
        raise ConfigError(
            f"parallel.sequence=true: parallel.tensor={ranks} must divide the {references.shape[1]} reference tokens "
            "of a sequence"
        )
    padding = context.new_zeros(B, -(P + S) % ranks)
    layout = JointLayout(
        config=config, prefix_length=P, context_length=S + padding.shape[1], reference_lengths_BN=lengths,
        chunk_references_BC=batch.get("chunk_references"), num_kept_tokens=num_kept_tokens,
        held=None if table is None else HeldMemories(
            table=table, read_H=batch["read_slots"], write_M=batch["write_slots"]),
    )
    passed = None
    if references.shape[1] and not reference_gradient:
        layout, passed = pass_references(model, references, prefix_BP, layout)
        references = references[:, :0]
    out = model(
        torch.cat([references, prefix_BP, context, padding], 1),
        None,
        None,
        labels=torch.cat([torch.zeros_like(prefix_BP), labels, padding], 1),
        extra_block_kwargs={"attention_bias": layout},
    )
    if out.dim() == 3:
        return out if passed is None else torch.cat([passed, out])
    return out[:, P : P + S]
