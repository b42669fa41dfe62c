"""The one table between Hugging Face names and our global tensors; both directions, and GGUF names, are read off it.

Every tensor of ours is a stack of rows of theirs: a row of the table says of which tensors, and how they interleave.
Queries, keys and values are stacked by kv group, the MLP's two projections as gate then up, and the vocabulary ends in
rows of zeros. A vector counts as a matrix without columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_m3.config import ModelConfig

LAYERS = "decoder.layers."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
QKV, GATE_UP = LAYERS + "self_attention.linear_qkv", LAYERS + "mlp.linear_fc1"
PROJECTION, DOWN = LAYERS + "self_attention.linear_proj", LAYERS + "mlp.linear_fc2"
STATELESS = (QKV, GATE_UP, PROJECTION, DOWN)
"""Modules for which megatron-core stores an empty extra state a layer."""

Sizes = Callable[[ModelConfig], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    ours: str
    """Key of the global tensor; those of layers are stored together, with a leading axis for the layer."""
    theirs: tuple[tuple[str, str], ...]
    """Hugging Face and GGUF names of the tensors stacked in it, ``{}`` standing for the layer."""
    rows: Sizes
    """Rows of each of ``theirs``."""
    columns: Callable[[ModelConfig], int] | None = None
    """Columns, None of a vector."""
    groups: Callable[[ModelConfig], int] = lambda model: 1
    """Interleaved groups: in each stands that share of every one of ``theirs``."""
    split: Literal["rows", "columns", "no"] = "no"
    """The axis that tensor-parallel ranks share out."""
    present: Callable[[ModelConfig], bool] = lambda model: True
    """Whether a model has it."""


def _hidden(model: ModelConfig) -> int:
    return model.hidden_size


def _query_rows(model: ModelConfig) -> int:
    return model.num_heads * model.head_size


def _qkv_rows(model: ModelConfig) -> tuple[int, ...]:
    key_rows = model.num_kv_heads * model.head_size
    return _query_rows(model), key_rows, key_rows


def _norm(ours: str, theirs: str, gguf: str) -> Row:
    return Row(ours=ours, theirs=((theirs, gguf),), rows=lambda model: (model.hidden_size,))


def _head_norm(letter: str) -> Row:
    return Row(
        ours=f"{LAYERS}self_attention.{letter}_layernorm.weight",
        theirs=((f"model.layers.{{}}.self_attn.{letter}_norm.weight", f"blk.{{}}.attn_{letter}_norm.weight"),),
        rows=lambda model: (model.head_size,),
        present=lambda model: model.qk_norm,
    )


def _qkv(kind: str, columns: Callable[[ModelConfig], int] | None, present: Callable[[ModelConfig], bool]) -> Row:
    names = tuple((f"model.layers.{{}}.self_attn.{one}_proj.{kind}", f"blk.{{}}.attn_{one}.{kind}") for one in "qkv")
    return Row(ours=f"{QKV}.{kind}", theirs=names, rows=_qkv_rows, columns=columns, split="rows", present=present,
               groups=lambda model: model.num_kv_heads)


TABLE = (
    Row(ours=EMBEDDING, theirs=(("model.embed_tokens.weight", "token_embd.weight"),), split="rows",
        rows=lambda model: (model.vocab_size,), columns=_hidden),
    _norm(f"{QKV}.layer_norm_weight", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    _qkv("weight", _hidden, lambda model: True),
    _qkv("bias", None, lambda model: model.qkv_bias),
    _head_norm("q"),
    _head_norm("k"),
    Row(ours=f"{PROJECTION}.weight", theirs=(("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),),
        rows=lambda model: (model.hidden_size,), columns=_query_rows, split="columns"),
    _norm(f"{GATE_UP}.layer_norm_weight", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    Row(ours=f"{GATE_UP}.weight", split="rows", rows=lambda model: (model.ffn_size, model.ffn_size), columns=_hidden,
        theirs=(("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
                ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"))),
    Row(ours=f"{DOWN}.weight", theirs=(("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),),
        rows=lambda model: (model.hidden_size,), columns=lambda model: model.ffn_size, split="columns"),
    _norm(FINAL_NORM, "model.norm.weight", "output_norm.weight"),
    Row(ours=OUTPUT, theirs=(("lm_head.weight", "output.weight"),), rows=lambda model: (model.vocab_size,),
        columns=_hidden, split="rows", present=lambda model: not model.tie_embeddings),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one of their tensors, as they stand in one of ours."""

    start: int
    """First row in our tensor."""
    rows: int
    name: str
    """Hugging Face name; empty where our rows are padding."""
    their_start: int
    """First row in their tensor."""


@dataclass(frozen=True, kw_only=True)
class OurTensor:
    """One tensor of ours, or one layer's slice of it."""

    key: str
    layer: int | None
    num_layers: int
    shape: tuple[int, ...]
    """``(rows, columns)``, or ``(rows,)``, without the axis of layers."""
    parts: tuple[Part, ...]
    """What its rows are, in order and without gaps."""
    split: Literal["rows", "columns", "no"]
    blocks: tuple[int, ...]
    """Rows of each block that tensor-parallel ranks share out on its own."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return self.shape if self.layer is None else (self.num_layers, *self.shape)

    def offset(self, *position: int) -> tuple[int, ...]:
        """Place in the checkpoint's tensor of ``position`` in this one."""
        return position if self.layer is None else (self.layer, *position)

    def parts_within(self, first: int, last: int) -> Iterator[Part]:
        """What the rows ``first`` up to ``last`` are."""
        for part in self.parts:
            begin, end = max(first, part.start), min(last, part.start + part.rows)
            if begin < end:
                yield Part(start=begin, rows=end - begin, name=part.name,
                           their_start=part.their_start + begin - part.start)


def our_tensors(model: ModelConfig) -> Iterator[OurTensor]:
    """All tensors of a model, layer by layer."""
    rows = [row for row in TABLE if row.present(model)]
    layered = [row for row in rows if "{}" in row.theirs[0][0]]
    yield from (_tensor(row, model, None) for row in rows if row.ours == EMBEDDING)
    for layer in range(model.num_layers):
        yield from (_tensor(row, model, layer) for row in layered)
    yield from (_tensor(row, model, None) for row in rows if row not in layered and row.ours != EMBEDDING)


def _tensor(row: Row, model: ModelConfig, layer: int | None) -> OurTensor:
    sizes, groups = row.rows(model), row.groups(model)
    parts, start = [], 0
    for group in range(groups):
        for (name, _), size in zip(row.theirs, sizes, strict=True):
            share = size // groups
            parts.append(Part(start=start, rows=share, name=name.format(layer), their_start=group * share))
            start += share
    if row.ours in (EMBEDDING, OUTPUT) and model.padded_vocab_size > start:
        parts.append(Part(start=start, rows=model.padded_vocab_size - start, name="", their_start=0))
        start = model.padded_vocab_size
    columns = () if row.columns is None else (row.columns(model),)
    return OurTensor(key=row.ours, layer=layer, num_layers=model.num_layers, shape=(start, *columns),
                     parts=tuple(parts), split=row.split, blocks=sizes if groups == 1 and len(sizes) > 1 else (start,))


def their_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model under its Hugging Face name, in the order of :func:`our_tensors`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in our_tensors(model):
        for part in tensor.parts:
            if part.name:
                before = shapes.get(part.name, (0,))[0]
                shapes[part.name] = (before + part.rows, *tensor.shape[1:])
    return shapes


def places(model: ModelConfig) -> dict[str, list[tuple[OurTensor, Part]]]:
    """Where each of their tensors stands in ours, its parts in the order of its own rows."""
    found: dict[str, list[tuple[OurTensor, Part]]] = {}
    for tensor in our_tensors(model):
        for part in tensor.parts:
            if part.name:
                found.setdefault(part.name, []).append((tensor, part))
    return {name: sorted(where, key=lambda pair: pair[1].their_start) for name, where in found.items()}


def gguf_names(model: ModelConfig) -> dict[str, str]:
    """Hugging Face name of every tensor of a model by its GGUF name."""
    return {
        gguf.format(layer): name.format(layer)
        for row in TABLE if row.present(model)
        for name, gguf in row.theirs
        for layer in range(model.num_layers if "{}" in name else 1)
    }


def extra_states(num_layers: int) -> Iterator[str]:
    """Keys under which megatron-core stores the empty extra states of its linear layers."""
    for layer in range(num_layers):
        yield from (f"{module}._extra_state/shard_{layer}_{num_layers}" for module in STATELESS)
