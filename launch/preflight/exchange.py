"""The nodes' reports, at the head: lines of JSON over one connection from each node.

A node says hello when it starts, asks for the head's time, hands in its report, hears whether there is to be an
all-reduce, hands in what its ranks found, and hears the verdict. The head waits for each until a deadline, and names
the nodes that it has not heard of. Every line carries the job's token; who has another is hung up on.
"""

import hmac
import json
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from configs.errors import InputError

_RETRY_SECONDS = 0.5
_CLOCK_ROUNDS = 5
_LONGEST_LINE = 2**24  # bytes; a report takes some thousand


class Head:
    """The head's side. Answers are set once, and reach every node that asks for them, before or after."""

    def __init__(self, host: str, port: int, clock: Callable[[], float] = time.time, *, token: str = "") -> None:
        self.told: dict[str, dict[int, Any]] = {"hello": {}, "report": {}, "ranks": {}}
        self._news = threading.Condition()
        self._answers: dict[str, Any] = {}
        self._heard: Counter[str] = Counter()
        self._clock = clock
        head = self

        class Node(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while line := self.rfile.readline(_LONGEST_LINE):
                    try:
                        message = json.loads(line)
                        if not hmac.compare_digest(message["token"], token):
                            return
                        answer = head._take(int(message["node"]), message["kind"], message.get("value"))
                    except (ValueError, LookupError, TypeError):
                        return  # nobody of ours
                    self.wfile.write(json.dumps(answer).encode() + b"\n")
                    head._note_heard(message["kind"])

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A node that left in the middle of a line is one that did not come."""

        try:
            self._server = Server((host, port), Node)
        except OSError as error:
            raise InputError(
                f"port {port} of {host or socket.gethostname()}: {error.strerror}. Is it in use?"
            ) from error
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def wait(self, kind: str, count: int, deadline: float) -> dict[int, Any]:
        """What the nodes have told of a kind, once all have, or at the deadline (of the monotonic clock)."""
        with self._news:
            self._news.wait_for(lambda: len(self.told[kind]) >= count, max(deadline - time.monotonic(), 0))
            return dict(self.told[kind])

    def answer(self, kind: str, value: Any) -> None:
        with self._news:
            self._answers[kind] = value
            self._news.notify_all()

    def wait_until_heard(self, kind: str, seconds: float) -> None:
        """Return when all who have told something of a kind have their answer, or after so long."""
        with self._news:
            self._news.wait_for(lambda: self._heard[kind] >= len(self.told[kind]), seconds)

    def _note_heard(self, kind: str) -> None:
        with self._news:
            self._heard[kind] += 1
            self._news.notify_all()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, node: int, kind: str, value: Any) -> Any:
        if kind == "time":
            return self._clock()
        with self._news:
            self.told[kind][node] = value
            self._news.notify_all()
            if kind == "hello":
                return None
            self._news.wait_for(lambda: kind in self._answers)
            return self._answers[kind]


class Connection:
    """A node's side."""

    def __init__(
        self, node: int, host: str, port: int, patience_seconds: float, answer_seconds: float, *, token: str = ""
    ) -> None:
        """Raises InputError if the head cannot be reached for so long.  answer_seconds: that it may take to answer."""
        self._node, self._token = node, token
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                self._socket = socket.create_connection((host, port), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"the run's first node is not reached at {host}, port {port} ({error})."
                    ) from error
                time.sleep(_RETRY_SECONDS)
        self._socket.settimeout(answer_seconds)
        self._lines = self._socket.makefile("rwb")
        self.address: str = self._socket.getsockname()[0]

    def tell(self, kind: str, value: Any = None) -> Any:
        """The head's answer. Raises ConnectionError if it is gone, or silent for longer than it may."""
        told = {"token": self._token, "node": self._node, "kind": kind, "value": value}
        try:
            self._lines.write(json.dumps(told).encode() + b"\n")
            self._lines.flush()
            line = self._lines.readline()
        except TimeoutError as error:
            seconds = self._socket.gettimeout()
            raise ConnectionError(f"the run's first node has not answered for {seconds:.0f} s") from error
        if not line:
            raise ConnectionError("the run's first node is gone")
        return json.loads(line)

    def clock_difference(self, clock: Callable[[], float] = time.time) -> float:
        """Seconds that this clock is ahead of the head's, by the quickest of a few answers."""
        rounds = []
        for _ in range(_CLOCK_ROUNDS):
            before, start = clock(), time.monotonic()
            theirs = self.tell("time")
            took = time.monotonic() - start
            rounds.append((took, before + took / 2 - theirs))
        return min(rounds)[1]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
