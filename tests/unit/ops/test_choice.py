"""Which backend `auto` is, and that it says why."""

import re
from dataclasses import replace

import pytest
import torch

from megatron_m3.config import ModelConfig, get_recipe
from megatron_m3.errors import UnsupportedError
from megatron_m3.ops import choice, rope, select_tokens, triton_support
from megatron_m3.ops.choice import choose_backend, decide
from megatron_m3.ops.memory_attention import triton_backend
from megatron_m3.ops.select_tokens import choice as selection


@pytest.mark.parametrize(("architecture", "head_size", "told"), [
    (None, 64, "torch (auto: no CUDA device)"),
    (90, 80, "triton (auto: CUDA sm_90)"),
    (90, 320, "torch (auto: triton takes heads of up to 256)"),
    (89, 64, "no tiles for sm_89"),
])
def test_auto_takes_what_the_card_can_run(architecture, head_size, told):
    assert told in str(decide(architecture, head_size))


@pytest.fixture
def undecided(monkeypatch, tmp_path):
    """As in a new process of a user who has not used Triton yet."""
    cached = decide, rope.triton_backend.kernels, triton_backend.kernels, triton_support.compiler_fault
    for function in cached:
        function.cache_clear()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(("name", "value", "told"), [
    ("PATH", "/nowhere", r"\(Failed to find C compiler\)"),
    ("CC", "no-compiler", r"\(.*No such file or directory: 'no-compiler'\)"),
    ("CC", "/bin/false", r"\(/bin/false ended with status 1\)"),
])
def test_without_a_c_compiler_auto_is_torch_and_triton_is_refused(name, value, told, undecided, monkeypatch):
    monkeypatch.setenv(name, value)
    told += "; install gcc and Python's headers, or set CC to a C compiler; or use torch"
    found = decide(90, 64)
    assert found.name == "torch"
    assert re.search(told, found.why)
    assert "\n" not in found.why
    table = rope.turns(torch.zeros(1, 4, 1, 32), torch.float32)
    with pytest.raises(UnsupportedError, match=f"model.attention=triton: RoPE: .*{told}"):
        rope.rotate(torch.zeros(1, 4, 2, 64), table, "triton")


def test_on_the_cpu_it_is_torch_and_a_name_is_taken_as_it_is():
    model = get_recipe("demo").model
    assert model.attention == ModelConfig.__dataclass_fields__["attention"].default == "auto"
    assert choose_backend(model).name == "torch"
    assert str(choose_backend(replace(model, attention="reference"))) == "reference"


@pytest.mark.parametrize(("attention", "architecture", "head_size", "expected"), [
    ("triton", 90, 80, True), ("triton", None, 80, True),
    ("te", 90, 80, True), ("te", 100, 64, True), ("te", 80, 64, True),
    ("te", 89, 64, False), ("te", 90, 320, False), ("te", None, 64, False),
    ("torch", 90, 80, False), ("reference", 90, 80, False),
])
def test_rope_and_selection_take_triton_beside_te_where_auto_would(
    attention, architecture, head_size, expected, monkeypatch
):
    monkeypatch.setattr(choice, "cuda_architecture", lambda: architecture)
    called = []
    monkeypatch.setattr(rope.triton_backend, "rotate", lambda vectors, table: called.append("rope"))
    monkeypatch.setattr(selection.triton_backend, "token_weights", lambda query, key, lengths, *rule: (
        called.append("selection") or select_tokens.token_weights(query, key, lengths, *rule)))
    vectors = torch.zeros(1, 4, 2, head_size)
    rope.rotate(vectors, rope.turns(torch.zeros(1, 4, 1, head_size // 2), torch.float32), attention)
    select_tokens.select_tokens(vectors, vectors, torch.tensor([4]), 2, backend=attention)
    assert called == ["rope", "selection"] * expected
