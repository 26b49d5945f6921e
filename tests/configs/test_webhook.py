import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from configs import webhook
from configs.webhook import VARIABLE, notify, notify_end
from tests.patience import PATIENCE


@pytest.fixture
def hook(monkeypatch):
    """A server on loopback: hook.url; hook.got, the notices; hook.answer, its status."""

    monkeypatch.setattr(webhook, "_SECONDS", 120.0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(server.answer)
            if server.answer == 302:
                self.send_header("Location", f"{server.url}elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    server: Any = HTTPServer(("127.0.0.1", 0), Handler)
    server.got, server.answer = [], 200
    server.url = f"http://127.0.0.1:{server.server_address[1]}/planted-secret/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("code, kind", [(0, "finished"), (75, "stopped"), (1, "failed"), (2, "failed")])
def test_an_end_is_told_by_its_kind(hook, code, kind):
    notify_end("sofa", code=code, reason="why it ended", step=7, environment={VARIABLE: hook.url})
    (told,) = hook.got
    assert (told["run"], told["kind"], told["step"]) == ("sofa", kind, 7)
    assert told["text"] == told["content"] and told["text"].startswith(f"fluxfill: sofa {kind} at step 7")
    assert ("why it ended" in told["text"]) == (code != 0)


def test_nothing_is_sent_unless_it_is_asked_for(hook, monkeypatch):
    monkeypatch.setattr(threading, "Thread", None)
    notify_end("sofa", code=1, reason="", step=None, environment={})
    notify_end("sofa", code=1, reason="", step=None, environment={VARIABLE: ""})
    assert hook.got == []


@pytest.mark.parametrize("answer, said", [(500, "500"), (302, "302")])
def test_a_refusal_is_said_without_the_url_and_no_redirect_is_followed(hook, capfd, answer, said):
    hook.answer = answer
    notify_end("sofa", code=1, reason="x", step=None, environment={VARIABLE: hook.url})
    shown = capfd.readouterr().err
    assert len(hook.got) == 1 and said in shown and "planted" not in shown


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/planted", "file:///etc/planted", "planted", "http://[planted", "http://\x00planted/"]
)
def test_what_cannot_be_reached_costs_a_line(capfd, url):
    notify_end("sofa", code=0, reason="", step=None, environment={VARIABLE: url})
    shown = capfd.readouterr().err
    assert shown.count("no notice was sent") == 1 and "planted" not in shown


def test_a_server_that_never_answers_is_left_after_a_while(capfd, monkeypatch):
    monkeypatch.setattr(webhook, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        notify_end("sofa", code=0, reason="", step=None, environment={VARIABLE: url})
        for thread in threading.enumerate():  # it may have been left a moment before it gives up itself
            if thread.name == "webhook":
                thread.join()
    assert "no notice was sent" in capfd.readouterr().err


def test_a_notice_may_go_while_the_run_goes_on(hook):
    notify("sofa", "skipped an update", reason="x" * 10_000, step=3, wait=False, environment={VARIABLE: hook.url})
    deadline = time.monotonic() + PATIENCE
    while not hook.got and time.monotonic() < deadline:
        time.sleep(0.02)
    (told,) = hook.got
    assert told["text"].startswith("fluxfill: sofa skipped an update at step 3: xxx") and len(told["text"]) < 2000
