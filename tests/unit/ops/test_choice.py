"""Which backend `auto` is, and that it says why."""

from dataclasses import replace

import pytest

from megatron_m3.config import ModelConfig, get_recipe
from megatron_m3.ops.choice import choose_backend, decide


@pytest.mark.parametrize(("architecture", "head_size", "told"), [
    (None, 64, "torch (auto: no CUDA device)"),
    (90, 80, "triton (auto: CUDA sm_90)"),
    (90, 320, "torch (auto: triton takes heads of up to 256)"),
    (89, 64, "no tiles for sm_89"),
])
def test_auto_takes_what_the_card_can_run(architecture, head_size, told):
    assert told in str(decide(architecture, head_size))


def test_on_the_cpu_it_is_torch_and_a_name_is_taken_as_it_is():
    model = get_recipe("demo").model
    assert model.attention == ModelConfig.__dataclass_fields__["attention"].default == "auto"
    assert choose_backend(model).name == "torch"
    assert str(choose_backend(replace(model, attention="reference"))) == "reference"
