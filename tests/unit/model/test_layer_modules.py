"""What a layer is made of: fused SwiGLU against plain, and Transformer Engine's modules."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_m3.config import replace_fields
from megatron_m3.errors import UnsupportedError
from megatron_m3.ops.memory_attention import te_backend
from tests.tiny_model import tiny_config


def test_fused_swiglu_gives_the_loss_and_the_gradients_of_plain() -> None:
    from megatron_m3.model.gpt import build_model, training_forward
    from tests.benchmarks.bench_training import PREFIX, batches

    results = []
    config = tiny_config(training__stage="continual", training__dtype="fp32", model__init_std="0.1")
    for fused in (False, True):
        [model] = build_model(config)
        model = model.double()
        model.config.bias_activation_fusion = fused
        loss = training_forward(model, next(batches(config)), config, torch.tensor(PREFIX)).mean()
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


def test_swiglu_is_fused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_m3.model.gpt import transformer_config

    for is_cuda in (True, False):
        monkeypatch.setattr("megatron_m3.model.gpt.select", lambda is_cuda=is_cuda: SimpleNamespace(is_cuda=is_cuda))
        assert transformer_config(tiny_config()).bias_activation_fusion is is_cuda


def test_transformer_engine_is_refused_by_name_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_m3.model import layers
    from megatron_m3.model.gpt import build_model

    config = replace_fields(tiny_config(), {"training.transformer_impl": "transformer_engine"})
    who = "training.transformer_impl=transformer_engine: "
    with pytest.raises(UnsupportedError, match=f"{who}.* CUDA devices alone; set it to local"):
        build_model(config)
    monkeypatch.setattr(layers, "select", lambda: SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(te_backend.importlib.metadata, "version", lambda name: "2.17.0")
    with pytest.raises(UnsupportedError, match=f"{who}Transformer Engine 2.17.0 .* or set it to local"):
        build_model(config)


def test_real_modules_read_and_write_the_same_checkpoints() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.unit.model.te_layers_case"],
                          capture_output=True, text=True, timeout=600)
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout.strip())
    assert "passed both ways" in done.stdout, done.stderr
