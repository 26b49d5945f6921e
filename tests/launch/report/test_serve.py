import html
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from unittest.mock import Mock

import pytest

from launch.report import serve
from launch.report.run import RunReader
from launch.report.serve import WatchServer
from tests.browser import dump
from tests.patience import PATIENCE


@pytest.fixture
def start():
    """start(server): serves until the test is over; returns its URL."""
    running = []

    def run(server: WatchServer) -> str:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server.url

    yield run
    for server in running:
        server.shutdown()
        server.server_close()


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
        return answer.read(), answer.headers


def refusal(url, **headers):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(url, **headers)
    return error.value.code


def test_it_serves_page_data_and_pictures_on_loopback_alone(make_run, start):
    server = WatchServer([make_run("a"), make_run("b")], 0)
    url = start(server)
    assert server.server_address[0] == "127.0.0.1"
    assert "connect-src 'self'" in html.unescape(get(url)[0].decode())
    runs = json.loads(get(f"{url}data.json")[0])["runs"]
    assert [run["name"] for run in runs] == ["a", "b"]
    body, headers = get(url + runs[1]["grids"][-1]["holdout"])
    assert body.startswith(b"\x89PNG") and headers["Content-Type"] == "image/png"
    assert refusal(f"{url}data.json", **{"If-None-Match": get(f"{url}data.json")[1]["ETag"]}) == 304


@pytest.mark.parametrize(
    "path",
    [
        *("config.yaml", "pictures/0/config.yaml", "pictures/0/../config.yaml", "pictures/0/..%2fconfig.yaml"),
        *(
            "pictures/7/step-00000000-train.png",
            "pictures/-1/step-00000000-train.png",
            "pictures/²/step-00000000-train.png",
        ),
        *("pictures/0/step-00000009-train.png", "etc/passwd", "/etc/passwd"),
    ],
)
def test_nothing_else_of_the_disk_is_served(make_run, start, path):
    assert refusal(start(WatchServer([make_run("a")], 0)) + urllib.parse.quote(path)) == 404


def test_runs_of_one_name_are_called_by_their_folders(make_run, start):
    folders = [make_run("a", title="sofa"), make_run("b", title="sofa"), make_run("c")]
    runs = json.loads(get(f"{start(WatchServer(folders, 0))}data.json")[0])["runs"]
    assert [run["name"] for run in runs] == [str(folders[0]), str(folders[1]), "c"]


def test_a_page_of_another_site_gets_nothing_by_a_name_made_to_mean_this_machine(make_run, start):
    url = start(WatchServer([make_run("a")], 0))
    assert refusal(f"{url}data.json", Host="evil.example:8384") == 403
    assert get(f"{url}data.json", Host="localhost:9999")[0]


def test_the_page_and_its_data_never_read_the_runs_at_once(make_run, monkeypatch):
    server = WatchServer([make_run("a")], 0)
    read, locked = RunReader.read, []
    monkeypatch.setattr(RunReader, "read", lambda reader: locked.append(server._lock.locked()) or read(reader))
    server.page()
    server.data()
    server.server_close()
    assert locked == [True, True]


def test_a_browser_that_goes_away_is_no_error_and_another_fault_is_one(make_run, start, monkeypatch, capsys):
    server = WatchServer([make_run("a")], 0)
    over = threading.Semaphore(0)
    finish = server.shutdown_request
    monkeypatch.setattr(server, "shutdown_request", lambda request: (finish(request), over.release()))
    for fault in (BrokenPipeError, ConnectionResetError, ZeroDivisionError):
        monkeypatch.setattr(server, "page", Mock(side_effect=fault))
        if fault is BrokenPipeError:
            start(server)
        with pytest.raises(ConnectionError):
            get(server.url)
        assert over.acquire(timeout=PATIENCE)
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "BrokenPipe" not in said and "ConnectionReset" not in said


def test_in_a_browser_the_page_follows_a_run_that_writes(make_run, start, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_LOOK_SECONDS", -1.0)
    run = make_run("a")

    class Written(WatchServer):
        """A run that writes a step at each look."""

        looks = 0

        def data(self) -> bytes:
            self.looks += 1
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 200 + self.looks, "time": 1.8e9, "loss": 0.125}) + "\n")
            return super().data()

    server = Written([run], 0)
    shown = dump(start(server), tmp_path, "--virtual-time-budget=20000")
    steps = [200 + look for look in range(2, server.looks + 1)]  # the first is drawn before the page asks again
    assert any(f"<b>{step}</b>" in shown for step in steps)
    assert "<b>0.125</b>" in shown and ">live</span>" in shown
