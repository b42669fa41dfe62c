"""Small real data, and whole training runs in this process."""

import json

import pytest

from megatron_m3.config import replace_fields
from megatron_m3.platform import select
from tests.small_data import make_small_data


@pytest.fixture(scope="session")
def training_data(tmp_path_factory):
    select()
    return make_small_data(tmp_path_factory.mktemp("training_data"))


@pytest.fixture(scope="session")
def other_data(tmp_path_factory):
    """Data of fewer texts, and so of another tokenizer."""
    select()
    return make_small_data(tmp_path_factory.mktemp("other_data"), entries=48)


@pytest.fixture
def run(training_data, tmp_path):
    """``run(**overrides)`` trains the tiny recipe in ``tmp_path / name`` and returns its summary and records."""

    def train_with(name="run", data=training_data, **overrides):
        from megatron_m3.training.loop import train

        fields = {"training.output": str(tmp_path / name), "logging.tensorboard": "false", "logging.peak_tflops": "1"}
        fields |= {key.replace("__", "."): str(value).lower() if isinstance(value, bool) else str(value)
                   for key, value in overrides.items()}
        summary = train(replace_fields(data.config(), fields))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return summary, [json.loads(line) for line in lines]

    return train_with
