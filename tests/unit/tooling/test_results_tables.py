"""The tables of times in docs/results.md are those that results.csv gives."""

import pytest

from tests.benchmarks import results


def test_the_document_holds_what_the_rows_give():
    document = results.DOCUMENT.read_text(encoding="utf-8")
    assert results.fill(document, results.read()) == document, "run python -m tests.benchmarks.results --write"
    assert "<!-- times: attention -->\nNVIDIA " in document


MEASURED = {"shape": "s", "batch": 1, "what": "triton", "pass": "select", "p20_ms": 1, "p50_ms": 1, "p80_ms": 1,
            "ratio": 1}


def row(**changes):
    base = {"date": "2026-01-02", "device": "A", "torch": "2", "triton": "3", "cudnn": "", "te": "2.20.2",
            "benchmark": "kernels", "shape": "s", "batch": "1", "tokens": "9", "what": "floor", "pass": "select",
            "p20_ms": "1", "p50_ms": "2", "p80_ms": "3", "ratio": "1"}
    return base | changes


def test_the_newest_run_of_each_device_is_shown():
    place = "before\n<!-- times: kernels -->\nold\n<!-- end -->\nafter"
    rows = [row(), row(what="triton", p50_ms="0.5", ratio="0.25"), row(date="2025-01-01", p50_ms="7"),
            row(device="B", p50_ms="4")]
    head = "| shape | pass | floor | triton |\n|---|---|---:|---:|\n"
    assert results.fill(place, rows) == (
        "before\n<!-- times: kernels -->\n"
        f"A, torch 2, Triton 3, Transformer Engine 2.20.2, 2026-01-02:\n\n{head}| s, 1 x 9 | select | 2.000 (1.00) | "
        "0.500 (0.25) |\n\n"
        "B, torch 2, Triton 3, Transformer Engine 2.20.2, 2026-01-02:\n\n| shape | pass | floor |\n|---|---|---:|\n"
        "| s, 1 x 9 | select | 4.000 (1.00) |\n<!-- end -->\nafter"
    )


def test_a_limit_that_has_no_row_is_not_met(capsys):
    assert results.report("kernels", [MEASURED], {("select", "triton"): 1.1})
    assert not results.report("kernels", [MEASURED], {("select", "te"): 1.1})
    assert "te select: not measured   MISSED" in capsys.readouterr().out


def test_a_place_without_rows_says_so_and_rows_without_a_place_are_refused():
    place = "<!-- times: training -->\n<!-- end -->"
    assert results.NONE in results.fill(place, [])
    with pytest.raises(ValueError, match="<!-- times: kernels -->"):
        results.fill(place, [row()])
