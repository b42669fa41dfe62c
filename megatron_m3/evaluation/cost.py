"""What knowledge costs in each of its three formats: parameters, explicit memory, text (equation 1.1, appendix A)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_m3.config.flops import (
    BACKWARD,
    attention_flops,
    mlp_flops,
    output_flops,
    projection_flops,
    selection_flops,
)
from megatron_m3.config.schema import Config

TFLOP = 1e12
BYTES_PER_NUMBER = 2
"""Keys and values are held as 16-bit numbers."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeCost:
    """FLOPs of writing a piece of knowledge (one reference) once and reading it once (in one chunk), by format."""

    write_parameters: float
    """A training step's share; reading costs at least nothing, so this is a lower bound."""
    write_memory: float
    """Encoding the reference up to the last memory layer, and selecting tokens."""
    read_memory: float
    """A chunk that attends to the kept tokens."""
    read_text: float
    """A chunk that has the text in its context; writing costs nothing."""

    @property
    def interval(self) -> tuple[float, float]:
        """Expected usage counts between which explicit memory is the cheapest format; empty if the first is larger."""
        dearer_reading = self.read_text - self.read_memory
        low = self.write_memory / dearer_reading if dearer_reading > 0 else float("inf")
        return low, (self.write_parameters - self.write_memory) / self.read_memory

    def totals(self, uses: float) -> tuple[float, float, float]:
        """Equation 1.1 for one piece of knowledge used ``uses`` times: as parameters, explicit memory, text."""
        return self.write_parameters, self.write_memory + uses * self.read_memory, uses * self.read_text


def write_memory_flops(config: Config, length: int) -> float:
    """Appendix A's cost of writing the memory of a reference of ``length`` tokens; the prefix is not counted."""
    model, layers = config.model, config.memory_layers
    depth = layers[-1] + 1
    encoding = projection_flops(model, length) + attention_flops(model, length**2 / 2)
    return depth * encoding + (depth - 1) * mlp_flops(model, length) + len(layers) * selection_flops(model, 1, length)


def knowledge_cost(config: Config) -> KnowledgeCost:
    """Appendix A for any shape, with ``data.sequence_length`` as the length of a training sequence."""
    model, memory, length = config.model, config.memory, config.memory.reference_length
    memory_layers = _num_lists(config) / model.num_kv_heads  # as many with all their heads would read as much
    projection, mlp = projection_flops(model, length), mlp_flops(model, length)
    training = projection + mlp + attention_flops(model, length * config.data.sequence_length / 2)
    prompt = projection + attention_flops(model, length * (length / 2 + memory.chunk_length))
    return KnowledgeCost(
        write_parameters=(1 + BACKWARD) * (model.num_layers * training + output_flops(model, length)),
        write_memory=write_memory_flops(config, length),
        read_memory=memory_layers * attention_flops(model, memory.chunk_length * memory.num_kept_tokens),
        read_text=model.num_layers * prompt + (model.num_layers - 1) * mlp,
    )


def _num_lists(config: Config) -> int:
    """Pairs of a layer and a key-value head that hold memory."""
    return sum(map(len, config.memory_heads.values()))


@dataclass(frozen=True, kw_only=True)
class BankSize:
    """Bytes of one reference's keys and values (section 3.3, appendix B)."""

    dense: int
    """Every layer, every query head, every token, 16 bits."""
    sparse: int
    """Memory layers, memory heads, kept tokens, 16 bits."""
    compressed: int
    """The same, each key or value vector as one code."""
    factors: dict[str, float]
    """How much smaller by what: layers, heads, tokens, codec."""


def bank_size(config: Config, codec_bytes: int) -> BankSize:
    """Bytes of one full reference, with ``codec_bytes`` for each compressed key or value vector."""
    model, memory, num_lists = config.model, config.memory, _num_lists(config)
    vectors = num_lists * 2 * memory.num_kept_tokens
    dense_vectors = model.num_layers * 2 * model.num_heads * memory.reference_length
    vector_bytes = model.head_size * BYTES_PER_NUMBER
    return BankSize(
        dense=dense_vectors * vector_bytes,
        sparse=vectors * vector_bytes,
        compressed=vectors * codec_bytes,
        factors={
            "layers": model.num_layers / len(config.memory_layers),
            "heads": model.num_heads * len(config.memory_layers) / num_lists,
            "tokens": memory.reference_length / memory.num_kept_tokens,
            "codec": vector_bytes / codec_bytes,
        },
    )


def format_bytes(count: float) -> str:
    """Bytes in binary units, three significant digits."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {units[power]}"


def cost_table(name: str, cost: KnowledgeCost, size: BankSize, references: int) -> str:
    """The figures as text for people."""
    return "\n".join([
        f"Cost of a piece of knowledge for {name}, in TFLOP",
        "",
        *columns(
            ("format", "write", "read, each use"),
            ("parameters", f"{cost.write_parameters / TFLOP:.5g}", "at least 0"),
            ("explicit memory", f"{cost.write_memory / TFLOP:.5g}", f"{cost.read_memory / TFLOP:.5g}"),
            ("text in context", "0", f"{cost.read_text / TFLOP:.5g}"),
        ),
        "",
        _advantage(cost),
        "",
        f"Memory bank of {references:,} references",
        "",
        *columns(
            ("form", "bytes a reference", "bank"),
            *(
                (form, f"{count:,}", format_bytes(count * references))
                for form, count in (("dense", size.dense), ("sparse", size.sparse), ("compressed", size.compressed))
            ),
        ),
        "",
        "smaller by: " + ", ".join(f"{name} {factor:.3g}x" for name, factor in size.factors.items())
        + f"; in all {size.dense / size.compressed:,.0f}x",
    ])  # fmt: skip


def _advantage(cost: KnowledgeCost) -> str:
    low, high = cost.interval
    if low >= high:
        return "Explicit memory is the cheapest format for no number of uses."
    return f"Explicit memory is the cheapest format for {low:.4g} < uses < {high:.5g}."


def columns(*rows: Sequence[str]) -> Iterator[str]:
    """The rows of a table, indented: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(["  " + first, *rest])
