import threading
import time

import pytest

from data.preprocessing.run_ahead import run_ahead
from tests.patience import PATIENCE


def test_items_come_in_their_order():
    assert list(run_ahead(range(100), depth=3)) == list(range(100))
    assert list(run_ahead([], depth=1)) == []


def test_it_runs_so_far_ahead_and_no_farther():
    made = []
    items = run_ahead((made.append(number) or number for number in range(50)), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + PATIENCE
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3], "one used, two ready, one in the hand"
    items.close()


def test_what_is_raised_there_is_raised_here_in_its_place():
    def failing():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    items = run_ahead(failing(), depth=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_closed_early_it_ends_its_thread_and_its_source():
    closed = []

    def source():
        try:
            yield from range(1000)
        finally:
            closed.append(threading.current_thread().name)

    before = set(threading.enumerate())
    items = run_ahead(source(), depth=2)
    next(items)
    items.close()
    assert set(threading.enumerate()) - before == set()
    assert closed == ["ahead"]
