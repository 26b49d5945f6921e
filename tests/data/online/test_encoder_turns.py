"""Turns at the encoders: of two threads one at a time, and what the training needs first."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.online.encoder_turns import EncoderTurns, TurnsOver

PATIENCE = 20  # seconds


@pytest.fixture
def turns() -> EncoderTurns:
    return EncoderTurns([])


def test_nothing_comes_in_between_while_something_is_needed(turns):
    entered, stop = threading.Event(), threading.Event()

    def work():
        with turns.between(stop):
            entered.set()

    turns.need()
    turns.need()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        turns.have()
        assert not entered.wait(0.5)
        with turns.first():
            pass
        assert not entered.wait(0.3), "a batch was encoded, and another is still needed"
        turns.have()
        assert entered.wait(PATIENCE)
        working.result()


def test_one_thread_at_a_time_and_the_training_after_one_batch_at_most(turns):
    """Three threads that have something for in between all the time, and a training that comes now and then."""
    stop, inside, order = threading.Event(), [], []
    lock = threading.Lock()

    def use(kind):
        with lock:
            inside.append(kind)
            assert len(inside) == 1
            order.append(kind)
        time.sleep(0.002)
        with lock:
            inside.remove(kind)

    def work():
        try:
            for _ in range(1000):
                with turns.between(stop):
                    use("between")
        except TurnsOver:
            return

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work) for _ in range(3)]
        try:
            for _ in range(50):
                time.sleep(0.005)
                turns.need()
                with lock:
                    so_far = len(order)
                with turns.first():
                    use("first")
                turns.have()
                assert order.index("first", so_far) - so_far <= 1, "of those that had not begun when it was needed"
        finally:
            stop.set()
        for future in working:
            future.result()
    assert order.count("first") == 50 and order.count("between") > 10


def test_a_stop_ends_the_waiting(turns):
    stop = threading.Event()
    turns.need()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: turns.between(stop).__enter__())
        time.sleep(0.1)
        stop.set()
        with pytest.raises(TurnsOver):
            waiting.result(PATIENCE)


def test_a_turn_that_fails_is_given_back(turns):
    stop = threading.Event()
    for turn in (turns.first, lambda: turns.between(stop)):
        with pytest.raises(ValueError, match="broken"), turn():
            raise ValueError("broken")
    for turn in (turns.first, lambda: turns.between(stop)):
        with turn():
            pass
