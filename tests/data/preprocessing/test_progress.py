import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from data.preprocessing.progress import Waiting, advancing, open_progress, print_report
from data.preprocessing.worker import Worker


def console():
    return Console(file=io.StringIO(), record=True, width=120)


def test_a_log_gets_a_line_a_minute_in_the_place_of_a_bar(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("data.preprocessing.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = open_progress(console(), Worker())
    progress.get_time = lambda: now[0]
    advance = advancing(progress, progress.add_task("encoding", total=1000))
    for _ in range(40):
        now[0] += 10
        advance(20)
    lines = progress.console.export_text().splitlines()
    assert len(lines) == 400 // 60
    assert lines[0] == "encoding: 120 of 1000, 2.0/s, 0:07:20 left"
    assert lines[-1] == "encoding: 720 of 1000, 2.0/s, 0:02:20 left"


def test_a_terminal_has_the_bar_and_the_other_ranks_are_silent(monkeypatch):
    monkeypatch.setattr("data.preprocessing.progress._LINE_SECONDS", 0)
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True)
    for printer, worker in ((terminal, Worker()), (console(), Worker(1, 2, rank=1))):
        progress = open_progress(printer, worker)
        before = printer.file.getvalue()
        advancing(progress, progress.add_task("encoding", total=10))(5)
        assert printer.file.getvalue() == before


@pytest.mark.parametrize("rank, said", [(0, 2), (1, 0)])
def test_for_whom_it_waits_is_said_once(monkeypatch, rank, said):
    slept = []
    monkeypatch.setattr("data.preprocessing.progress.time", SimpleNamespace(sleep=slept.append))
    progress = open_progress(console(), Worker(rank, 1, rank=rank))
    waiting = Waiting(progress)
    for whom in ["process 7 on node-2"] * 20 + ["process 8 on node-3"] * 3:
        waiting(whom)
    lines = progress.console.export_text().splitlines()
    assert len(lines) == said
    assert all(re.fullmatch(r"waiting for process [78] on node-[23]", line) for line in lines)
    assert len(slept) == 23
    assert 0.2 < slept[0] < 1 < max(slept) <= 7.5
    assert slept[20] < 1, "somebody else, from the start"


@pytest.mark.parametrize("held, said", [(1, False), (3, True)])
def test_that_much_is_held_out_is_said(make_cache, held, said):
    """data.holdout counts pictures, and a small dataset may have few more."""
    cache = make_cache([("a", "32x32", 6), ("a", "32x32", held, "holdout")])
    shown = console()
    print_report(shown, cache.folder, cache.table, Worker(), num_encoded=0)
    assert (f"data.holdout keeps {held} of {6 + held} samples back" in shown.export_text()) == said


def test_a_path_is_shown_as_it_is_whatever_rich_makes_of_brackets(make_cache):
    cache, shown = make_cache([("a", "32x32", 6)]), console()
    print_report(shown, Path("/d/[bold]x[/y]"), cache.table, Worker(), num_encoded=0)
    assert "cache /d/[bold]x[/y]" in shown.export_text()
