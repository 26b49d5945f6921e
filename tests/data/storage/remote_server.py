"""A server of a cache's folder that can be told to fail."""

import threading
from collections import Counter
from pathlib import Path

from tests.patience import PATIENCE

SHARDS = [("a", "32x32", 4), ("a", "32x32", 3), ("a", "32x32", 5), ("b", "48x64", 4)]


class Remote:
    """A server of a cache's folder. faults: path -> what the next requests for it get instead of the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list] = {}
        self.requests: Counter = Counter()
        self.slow = threading.Event()
        self.slow.set()
        self._lock = threading.Lock()

    def get(self, handler) -> None:
        path = handler.path.lstrip("/")
        with self._lock:
            self.requests[path] += 1
        self.slow.wait(PATIENCE)
        with self._lock:
            fault = self.faults[path].pop(0) if self.faults.get(path) else None
        if isinstance(fault, int):
            handler.send_error(fault)
            return
        if not (self.folder / path).is_file():
            handler.send_error(404)
            return
        data = (self.folder / path).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
        elif fault == "page":
            data = b"<!DOCTYPE html><title>Please log in</title>".ljust(len(data))
        elif fault == "flip":
            data = data[:700] + bytes([data[700] ^ 4]) + data[701:]
        handler.wfile.write(data)
