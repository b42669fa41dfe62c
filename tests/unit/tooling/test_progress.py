"""Progress: a bar on a terminal, a plain line now and then elsewhere, a last line that says how long it took."""

import io

import pytest

from megatron_m3.platform.progress import Progress, format_seconds


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01"), (-5, "0:00"),
])
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_log_gets_a_line_per_interval_and_one_at_the_end() -> None:
    stream = io.StringIO()
    with Progress("encode", 3, "references", stream=stream, seconds_between_lines=0) as progress:
        for _ in range(3):
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "encode:  33% 1/3 references", "encode:  67% 2/3 references", *["encode: 100% 3/3 references"] * 2]
    assert "left" in lines[0]
    assert "took" in lines[-1]
    assert "\r" not in stream.getvalue()


def test_a_quick_job_logs_only_its_end() -> None:
    stream = io.StringIO()
    with Progress("encode", 1000, "references", stream=stream) as progress:
        progress.advance(1000)
    assert stream.getvalue().count("\n") == 1


def test_a_terminal_gets_a_bar_in_one_line() -> None:
    stream = Terminal()
    with Progress("encode", 2, "references", stream=stream) as progress:
        progress.last = 0.0
        progress.advance()
    assert "[##########          ]" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_a_failed_job_does_not_claim_to_have_taken_time() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Progress("encode", 2, "references", stream=stream):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert stream.getvalue() == ""


def test_other_ranks_say_nothing() -> None:
    stream = io.StringIO()
    with Progress("encode", 1, "references", enabled=False, stream=stream) as progress:
        progress.advance()
    assert stream.getvalue() == ""
