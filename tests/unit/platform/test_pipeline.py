"""Reading ahead and writing behind: order, bounds, errors, and an end of every thread."""

import threading

import pytest

from megatron_m3.platform.pipeline import Behind, read_ahead


def test_items_come_in_order_and_no_more_than_the_depth_ahead():
    made: list[int] = []

    def make():
        for item in range(20):
            made.append(item)
            yield item

    ahead = read_ahead(make(), 2)
    for place, item in enumerate(ahead):
        assert item == place
        assert len(made) <= place + 4  # this one, two that wait, one in the making
    assert made == list(range(20))


def test_an_error_of_the_reader_comes_out_after_what_it_read():
    def make():
        yield 1
        raise OSError("disk")

    ahead = read_ahead(make(), 2)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk"):
        next(ahead)


def test_a_closed_reader_ends():
    before, closed = threading.active_count(), threading.Event()

    def make():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    ahead = read_ahead(make(), 1)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


def test_work_is_done_in_order_and_behind():
    done: list[int] = []
    free = threading.Event()

    def work(item: int) -> None:
        free.wait()
        done.append(item)

    with Behind(work, 1) as behind:
        behind.put(0)
        behind.put(1)
        assert done == []
        free.set()
        for item in range(2, 9):
            behind.put(item)
    assert done == list(range(9))


def test_an_error_of_the_work_ends_it_and_is_raised():
    done: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise OSError("full")
        done.append(item)

    def put() -> None:
        with Behind(work, 1) as behind:
            for item in range(100):
                behind.put(item)

    with pytest.raises(OSError, match="full"):
        put()
    assert done == [0, 1, 2]


def test_an_error_of_the_caller_drops_what_waits():
    begun, free, done = threading.Event(), threading.Event(), list[int]()

    def work(item: int) -> None:
        begun.set()
        free.wait()
        done.append(item)

    def put() -> None:
        with Behind(work, 5) as behind:
            for item in range(5):
                behind.put(item)
            begun.wait()
            threading.Timer(0.05, free.set).start()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        put()
    assert done == [0]
