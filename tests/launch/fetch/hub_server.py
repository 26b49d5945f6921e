"""A hub on this machine, as far as huggingface_hub asks it: one model at one commit, which can be told to fail."""

import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "a" * 40
NAME = "black-forest-labs/FLUX.1-Fill-dev"
TOKEN = "hf_" + "x" * 34


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """gated: files are for TOKEN alone.  faults: path -> what the next downloads of it get: a status, "cut" (half of
    it), "flip" (another byte), or what a function gives that is called then.  sent: bytes sent of each path, or about
    to be.  asked: tokens that were shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gated = False
        self.faults: dict[str, list] = {}
        self.sent: Counter[str] = Counter()
        self.asked: set[str | None] = set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def do_HEAD(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self) -> dict[str, bytes]:
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}

    def answer(self, handler) -> None:
        path = urlsplit(handler.path).path
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.asked.add(token)
        if token not in (None, TOKEN, "hf_of_another"):
            self.refuse(handler, 401, None, "Invalid credentials in Authorization header")
        elif found := re.fullmatch(rf"/api/models/{NAME}(?:/revision/([^/]+))?", path):
            if found[1] in (None, "main", "v1", COMMIT):
                self.send_json(handler, {"id": NAME, "sha": COMMIT, "siblings": []})
            else:
                self.refuse(handler, 404, "RevisionNotFound")
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            self.send_json(handler, [self.entry(name, data) for name, data in sorted(self.files().items())])
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            if self.gated and token != TOKEN:
                self.refuse(handler, 403 if token else 401, "GatedRepo")
            else:
                self.send_file(handler, path.split(f"{COMMIT}/")[1])
        else:
            self.refuse(handler, 401 if token is None else 404, None if token is None else "RepoNotFound")

    def entry(self, name: str, data: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def send_file(self, handler, name: str) -> None:
        data = (self.folder / name).read_bytes()
        is_get = handler.command == "GET"
        fault = self.faults[name].pop(0) if is_get and self.faults.get(name) else None
        if callable(fault):
            fault = fault()
        if isinstance(fault, int):
            self.refuse(handler, fault, None)
            return
        entry = self.entry(name, data)
        start = int(re.match(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("ETag", f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.end_headers()
        if is_get:
            if fault == "flip":
                data = data[:-1] + bytes([data[-1] ^ 1])
            body = data[start : len(data) // 2] if fault == "cut" else data[start:]
            self.sent[name] += len(body)  # before whoever gets it looks here
            handler.wfile.write(body)

    def send_json(self, handler, answer) -> None:
        body = json.dumps(answer).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def refuse(self, handler, status: int, code: str | None, message: str = "no") -> None:
        handler.send_response(status)
        if code:
            handler.send_header("X-Error-Code", code)
        handler.send_header("X-Error-Message", message)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
