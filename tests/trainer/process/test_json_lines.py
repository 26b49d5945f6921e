import errno
import json
import logging
import math
import os
import time

from trainer.process.disk_room import append_text
from trainer.process.json_lines import EVENTS, append_line, write_event, write_waiting_lines


def test_what_is_not_finite_is_null_at_any_depth(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"loss": math.nan, "samples": [{"loss": -math.inf, "row": 3}], "pair": (1.5, math.inf)})
    append_line(path, {"loss": 1.0})
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"loss": None, "samples": [{"loss": None, "row": 3}], "pair": [1.5, None]}
    assert second == {"loss": 1.0}


def test_lines_that_find_room_at_the_end_are_written_and_others_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    full, (roomy, other) = {"roomy.jsonl", "other.jsonl"}, (tmp_path / "roomy.jsonl", tmp_path / "other.jsonl")

    def append(path, text):
        if path.name in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append_text(path, text)

    monkeypatch.setattr("trainer.process.json_lines.append_text", append)
    for number in range(3):
        append_line(roomy, {"step": number})
        append_line(other, {"step": number})
    assert not roomy.exists() and caplog.text.count("waits for room") == 2
    full.remove("roomy.jsonl")
    write_waiting_lines()
    assert [json.loads(line)["step"] for line in roomy.read_text().splitlines()] == [0, 1, 2]
    assert "not written: the last 3 line(s) of other.jsonl: " in caplog.text and not other.exists()
    full.clear()
    write_waiting_lines()


def test_an_event_says_when(tmp_path):
    before = time.time()
    write_event(tmp_path, "skip", step=3)
    event = json.loads((tmp_path / EVENTS).read_text())
    assert before - 1 <= event.pop("time") <= time.time() + 1
    assert event == {"event": "skip", "step": 3}
