import socket
import threading
import time

import pytest

from benchmarks.ranks import own_port
from configs.errors import InputError
from launch.preflight.exchange import Connection, Head
from tests.patience import PATIENCE

TOKEN = "of this job"


@pytest.fixture
def head():
    opened = Head("127.0.0.1", 0, token=TOKEN)
    yield opened
    opened.close()


def test_every_node_hears_the_answer_whether_it_asks_before_or_after(head: Head) -> None:
    heard: dict[int, object] = {}

    def take_part(node: int) -> None:
        connection = Connection(node, "127.0.0.1", head.port, 100, 100, token=TOKEN)
        assert connection.tell("hello", f"n{node}") is None
        heard[node] = connection.tell("report", {"node": node})
        connection.close()

    early = threading.Thread(target=take_part, args=(0,))
    early.start()
    assert head.wait("report", 1, time.monotonic() + PATIENCE) == {0: {"node": 0}}
    head.answer("report", "go")
    early.join(PATIENCE)
    take_part(1)
    assert heard == {0: "go", 1: "go"}
    assert head.wait("hello", 2, time.monotonic() + PATIENCE) == {0: "n0", 1: "n1"}


def test_the_head_waits_for_a_dead_node_no_longer_than_it_is_told(head: Head) -> None:
    start = time.monotonic()
    assert head.wait("hello", 1, start + 0.3) == {}
    assert time.monotonic() - start > 0.2


def test_a_clock_is_compared_with_the_heads(head: Head) -> None:
    connection = Connection(1, "127.0.0.1", head.port, 100, 100, token=TOKEN)
    assert connection.clock_difference() == pytest.approx(0, abs=1)
    assert connection.clock_difference(lambda: time.time() - 500) == pytest.approx(-500, abs=1)
    connection.close()


def test_a_stranger_disturbs_nobody(head: Head) -> None:
    for line in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"node": 1, "kind": "hello"}\n', b"\xff\xfe\n"):
        with socket.create_connection(("127.0.0.1", head.port)) as stranger:
            stranger.sendall(line)
            assert stranger.recv(100) == b""
    assert head.wait("hello", 1, time.monotonic()) == {}
    connection = Connection(1, "127.0.0.1", head.port, 100, 100, token=TOKEN)
    assert connection.tell("hello", "n1") is None
    connection.close()


def test_a_head_that_is_not_there_is_said_in_time() -> None:
    with (
        own_port() as port,
        pytest.raises(InputError, match=f"the run's first node is not reached at 127.0.0.1, port {port}"),
    ):
        Connection(1, "127.0.0.1", port, 0.1, 10)


def test_a_port_that_is_taken_is_said(head: Head) -> None:
    with pytest.raises(InputError, match=f"port {head.port} of 127.0.0.1: .*Is it in use"):
        Head("127.0.0.1", head.port)


@pytest.mark.parametrize("token", ["", "of another job", "é"])
def test_a_node_of_another_job_is_hung_up_on_and_tells_nothing(head: Head, token: str) -> None:
    connection = Connection(1, "127.0.0.1", head.port, 100, 100, token=token)
    with pytest.raises(OSError, match=r"the run's first node is gone|reset"):
        connection.tell("hello", "n1")
    connection.close()
    assert head.wait("hello", 1, time.monotonic()) == {}


def test_a_head_that_hangs_is_left(head: Head) -> None:
    connection = Connection(1, "127.0.0.1", head.port, 100, answer_seconds=0.2, token=TOKEN)
    with pytest.raises(ConnectionError, match="has not answered for 0 s"):
        connection.tell("report", {})  # which nobody judges
    connection.close()
