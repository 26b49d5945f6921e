import threading

import pytest

from configs.errors import InputError, StorageFailed
from data.storage.retry import ATTEMPTS, with_retries


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited."""
    waited = []
    monkeypatch.setattr("threading.Event.wait", lambda _, seconds: waited.append(seconds))
    return waited


def failing(times, error):
    calls = []

    def attempt():
        calls.append(None)
        if len(calls) <= times:
            raise error
        return len(calls)

    return attempt


def test_what_fails_for_a_while_is_tried_again_ever_later(waits):
    assert with_retries(failing(ATTEMPTS - 1, OSError("busy")), "a.tar") == ATTEMPTS
    assert len(waits) == ATTEMPTS - 1
    for wait, middle in zip(waits, (1, 2, 4, 8, 16, 30, 30), strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle
    assert len(set(waits)) == len(waits), "processes that fail together would come back together"


def test_what_keeps_failing_is_named_with_its_last_error(waits):
    with pytest.raises(StorageFailed, match=r"^s3://b/a\.tar: failed 8 time\(s\), .*ConnectionError: reset\. Look"):
        with_retries(failing(99, ConnectionError("reset")), "s3://b/a.tar")
    assert len(waits) == ATTEMPTS - 1


def test_what_a_user_must_mend_is_not_tried_again(waits):
    attempt = failing(1, InputError("no such driver"))
    with pytest.raises(InputError, match="no such driver"):
        with_retries(attempt, "a.tar")
    assert waits == []
    assert attempt() == 2


def test_a_stop_ends_the_waiting():
    stop = threading.Event()
    stop.set()
    with pytest.raises(InputError, match=r"failed 1 time\(s\)"):
        with_retries(failing(99, OSError("busy")), "a.tar", stop=stop)


def test_a_stop_during_a_wait_ends_it_without_another_attempt():
    stop, calls = threading.Event(), []

    def attempt():
        calls.append(None)
        raise OSError("busy")

    threading.Timer(0.1, stop.set).start()
    with pytest.raises(StorageFailed, match=r"a\.tar: failed 1 time\(s\), .*busy"):
        with_retries(attempt, "a.tar", stop=stop)
    assert len(calls) == 1


def test_no_attempt_begins_after_four_minutes(waits, monkeypatch):
    """A silent server takes a minute for each; the other processes of a run wait ten minutes at most."""
    clock = iter(range(0, 10_000, 65))
    monkeypatch.setattr("data.storage.retry.time.monotonic", lambda: next(clock))
    with pytest.raises(StorageFailed, match=r"failed 4 time\(s\)"):
        with_retries(failing(99, TimeoutError("timed out")), "a.tar")
