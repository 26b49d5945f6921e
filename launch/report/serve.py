"""The server of `fluxfill watch`: the page of several runs, live, for browsers on this machine alone."""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from launch.report.page import render_page
from launch.report.run import PICTURE, RunReader

HOST = "127.0.0.1"
_LOOK_SECONDS = 1.0  # between two looks at the folders, however many browsers ask
_LOOPBACK = {"localhost", HOST, "::1"}


class WatchServer(ThreadingHTTPServer):
    """Serves /, /data.json and /pictures/RUN/NAME.png; reads the runs' folders, and nothing else."""

    daemon_threads = True

    def __init__(self, runs: Sequence[Path], port: int) -> None:
        """port: 0 takes a free one. Raises OSError if it cannot be had."""
        super().__init__((HOST, port), _Handler)
        self._readers = [RunReader(run) for run in runs]
        self._lock = Lock()
        self._read = 0.0
        self._data = b""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> bytes:
        with self._lock:
            runs = self._runs()
        return render_page(runs, live=True).encode()

    def data(self) -> bytes:
        """What the page draws, at most a second old."""
        with self._lock:
            if time.monotonic() - self._read > _LOOK_SECONDS or not self._data:
                self._data = json.dumps({"live": True, "runs": self._runs()}, allow_nan=False).encode()
                self._read = time.monotonic()
            return self._data

    def picture(self, run: str, name: str) -> bytes | None:
        """A grid of a run, by the run's number; None if it has none of that name."""
        if not PICTURE.fullmatch(name) or not run.isdecimal() or int(run) >= len(self._readers):
            return None
        try:
            return (self._readers[int(run)].folder / "samples" / name).read_bytes()
        except OSError:
            return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing of a browser that closed its page or reloads it; whatever else went wrong is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _runs(self) -> list[dict[str, Any]]:
        """Under the lock: readers go on where they stopped, and two threads at once would take the same lines twice."""
        runs = [
            reader.read()
            | {
                "grids": [
                    {"step": step} | {split: f"pictures/{number}/{name}" for split, name in names.items()}
                    for step, names in sorted(reader.pictures().items())
                ]
            }
            for number, reader in enumerate(self._readers)
        ]
        bearers = Counter(run["name"] for run in runs)
        # Of runs of one name each is called by its folder.
        return [run | {"name": run["folder"] if bearers[run["name"]] > 1 else run["name"]} for run in runs]


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # A page of another site whose name was made to mean this machine: its browser says for which name it asks.
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in _LOOPBACK:
            return self._send(HTTPStatus.FORBIDDEN, b"ask for localhost\n", "text/plain")
        path = urlsplit(self.path).path
        match path.split("/")[1:]:
            case [""]:
                return self._send(HTTPStatus.OK, self.server.page(), "text/html; charset=utf-8")
            case ["data.json"]:
                return self._send(HTTPStatus.OK, self.server.data(), "application/json")
            case ["pictures", run, name] if (picture := self.server.picture(run, name)) is not None:
                return self._send(HTTPStatus.OK, picture, "image/png")
        self._send(HTTPStatus.NOT_FOUND, b"nothing of this name\n", "text/plain")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        tag = f'"{sha256(body).hexdigest()[:32]}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, body = HTTPStatus.NOT_MODIFIED, b""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for every look of every browser tells nobody anything."""
