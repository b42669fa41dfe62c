import json

import pytest
import torch

from megatron_m3.training.metrics import Metrics, format_count, known_peak, measure_peak_tflops, peak_tflops, step_line

RECORD = {"step": 25, "steps": 100, "loss": 3.14159, "grad_norm": 0.5, "lr": 4e-4, "tokens_per_second": 12345.0,
          "mfu": 0.312, "seconds_left": 3725.0}


def test_step_line_says_all():
    assert step_line(RECORD) == (
        "step 25/100  25% | loss 3.1416 | grad norm 0.500 | rate 4.00e-04 | 12.3k tokens/s | MFU 31.2% | 1:02:05 left"
    )
    assert "| rate 4.00e-04 | repeats 12% | 12.3k tokens/s |" in step_line(RECORD | {"repeats": 0.1234})


@pytest.mark.parametrize(("number", "text"), [(0.5, "0.5"), (999.0, "999"), (1e3, "1k"), (4.56e6, "4.56M")])
def test_counts_have_three_digits(number, text):
    assert format_count(number) == text


def test_going_back_drops_later_steps_but_not_events(tmp_path, capsys):
    metrics = Metrics(tmp_path, every=2, tensorboard=False)
    metrics.begin(0)
    for step in range(1, 5):
        metrics.step(RECORD | {"step": step})
    metrics.write({"event": "rollback", "to": 2})
    with metrics.path.open("a") as stream:
        stream.write('{"step": 5, "lo')
    metrics.begin(2)
    metrics.step(RECORD | {"step": 3})
    records = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [record.get("step", "event") for record in records] == [1, 2, "event", 3]
    shown = [line.split("|")[0].strip() for line in capsys.readouterr().err.splitlines()]
    assert shown == ["step 2/100   2%", "step 4/100   4%"]


def test_tensorboard_has_the_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, every=100, tensorboard=True)
    metrics.begin(0)
    for step in (1, 2, 3):
        metrics.step(RECORD | {"step": step, "loss": float(step)})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_peak_is_measured_where_it_is_not_known():
    assert 1e-4 < measure_peak_tflops(torch.device("cpu"), torch.float32, 0.05) < 1e3
    assert 1e-4 < peak_tflops(torch.device("cpu"), torch.float32) < 1e3


@pytest.mark.parametrize(("card", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250), ("Tesla T4", None), ("NVIDIA GH200 480GB", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA RTX A1000", None),
])
def test_peaks_of_cards_are_their_makers(card, peak):
    assert known_peak(card) == peak
