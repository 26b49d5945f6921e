import json
from importlib.metadata import version

import pytest

from configs.errors import InputError
from trainer.process import starts
from trainer.process.outcome import AlreadyDone, Stopped, run_and_report
from trainer.process.run_owner import disown
from trainer.process.starts import STARTS, note_end, note_start

PLACE = {"engine": "ddp", "processes": 8, "nodes": 1, "gpus": ["NVIDIA H100"], "commit": "abc"}


def lines(run):
    return [json.loads(line) for line in (run / STARTS).read_text().splitlines()]


def test_a_start_tells_hardware_and_versions(tmp_path):
    note_start(tmp_path, step=40, **PLACE)
    (start,) = lines(tmp_path)
    assert PLACE.items() <= start.items() and start["step"] == 40 and start["host"]
    assert start["versions"]["torch"] == version("torch") and "python" in start["versions"]


def test_an_end_goes_with_a_start_and_with_nothing_else(tmp_path):
    note_end(tmp_path, code=2, reason="no such model", step=None)
    note_end(None, code=2, reason="no such config", step=None)
    assert not list(tmp_path.iterdir())
    note_start(tmp_path, step=0, **PLACE)
    note_end(tmp_path, code=75, reason="stopped", step=3)
    assert [line.get("code") for line in lines(tmp_path)] == [None, 75]


def test_every_outcome_of_a_run_that_trained_is_there_once(arguments, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("FLUXFILL_OUTCOME", raising=False)
    run = tmp_path / "test"

    def end_with(error):
        def work():
            note_start(run, step=0, **PLACE)
            if error is not None:
                raise error
            return 9

        run_and_report(work)
        disown()

    for error in (Stopped(4, "SIGTERM", 4), InputError("guard: too many skips."), None):
        end_with(error)
    ends = [(line["code"], line["step"]) for line in lines(run) if "code" in line]
    assert ends == [(75, 4), (2, None), (0, 9)]


@pytest.mark.parametrize("end", [AlreadyDone(9, "nothing is left to train"), InputError("no such model.")])
def test_a_start_that_came_to_no_training_ends_no_earlier_one(arguments, tmp_path, monkeypatch, end):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("FLUXFILL_OUTCOME", raising=False)
    run = tmp_path / "test"
    run.mkdir()
    note_start(run, step=0, **PLACE)
    note_end(run, code=0, reason="done", step=9)
    before = (run / STARTS).read_text()
    monkeypatch.setattr(starts, "_is_noted", False)  # the next process

    def work():
        raise end

    run_and_report(work)
    disown()
    assert (run / STARTS).read_text() == before


def test_a_rank_that_notes_no_start_tells_the_end_once_it_trains(tmp_path, monkeypatch):
    note_start(tmp_path, step=0, **PLACE)
    monkeypatch.setattr(starts, "_is_noted", False)
    monkeypatch.setattr(starts, "is_training", lambda: True)
    note_end(tmp_path, code=1, reason="rank 3: lost", step=None)
    assert lines(tmp_path)[-1]["reason"] == "rank 3: lost"
