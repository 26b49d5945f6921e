import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks import turns
from benchmarks.turns import Turns, ratio


def test_a_step_is_told_without_the_wait_for_its_turn(monkeypatch):
    clock = [0.0]  # which goes on while a turn is waited for, and not else
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: clock[0], process_time=time.process_time))
    ours, theirs = multiprocessing.Pipe()
    told = []

    def train() -> None:
        mine = Turns(theirs)
        for _ in range(2):
            mine.end_step()

    thread = threading.Thread(target=train)
    thread.start()
    for _ in range(2):
        told.append(ours.recv())
        clock[0] += 100.0
        ours.send(True)
    thread.join()
    assert [wall for wall, _, _ in told] == [0.0, 0.0]
    assert all(peak >= 0 for _, _, peak in told)


def test_a_process_ends_when_it_gets_no_turn_any_more():
    ours, theirs = multiprocessing.Pipe()
    ours.send(False)
    with pytest.raises(SystemExit):
        Turns(theirs).end_step()


def test_ratios_are_medians_over_the_turns():
    assert ratio([2.0, 30.0, 4.0], [1.0, 3.0, 2.0]) == 2.0
