from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.status import worries
from launch.status.jobs import SlurmJob
from launch.status.run import Rollback, SlowestForward, SlowestRank, read_status
from launch.status.worries import find_worries, size, span


def test_a_run_that_goes_well_worries_nobody(make_run: Callable[..., Path]) -> None:
    assert find_worries(read_status(make_run("a", checkpoint=25)), []) == []


@pytest.mark.parametrize(
    "made, changed, told",
    [
        ({"age": 7200}, {}, "nothing was written for 2 h 0 min"),
        ({"steps": 600}, {}, "no checkpoint for 600 steps; checkpoint.every_steps is 250"),
        ({}, {"skipped": 2}, "2 of the last steps were skipped"),
        ({}, {"slowest_rank": SlowestRank(3, 0.9, 0.01)}, "rank 3 waits 0.9 s of a step for data"),
        ({}, {"slowest_forward": SlowestForward(5, 3.1, 2.0)}, "rank 5 takes 3.1 s of a step for its forward passes"),
        (
            {},
            {"rollbacks": (Rollback(9, 4, 0.5), Rollback(1200, 1000, 0.25))},
            "back 2 time(s), last from step",
        ),
        ({}, {"unreadable": ("/x/metrics.jsonl",)}, "/x/metrics.jsonl may not be read"),
    ],
)
def test_what_is_worrying_is_told(made: dict, changed: dict, told: str, make_run: Callable[..., Path]) -> None:
    [worry] = find_worries(replace(read_status(make_run("a", **made)), **changed), None)
    assert told in worry


def test_a_dependency_that_cannot_come_true_is_told(make_run: Callable[..., Path]) -> None:
    job = SlurmJob("13", "PENDING", "DependencyNeverSatisfied", "", Path("/"), "")
    [worry] = find_worries(read_status(make_run("a")), [job, replace(job, id="14", reason="Dependency")])
    assert worry.startswith("job 13 waits for one that has failed, and can never start")


@pytest.mark.parametrize("outcome, count", [(None, 1), ({"code": 0, "reason": "done", "step": 40}, 0)])
def test_a_disk_without_room_for_two_checkpoints_is_told_while_the_run_goes_on(
    outcome: dict | None, count: int, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worries.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    found = find_worries(read_status(make_run("a", outcome=outcome)), None)
    assert ["the disk is nearly full: 5.0 MiB free" in worry for worry in found] == [True] * count


def test_spans_and_sizes_are_read_at_a_glance() -> None:
    assert [span(seconds) for seconds in (5.4, 61, 3720, 90000)] == ["5 s", "1 min", "1 h 2 min", "1 d 1 h"]
    assert [size(count) for count in (0, 3 << 20, 5 << 30)] == ["0.0 MiB", "3.0 MiB", "5.0 GiB"]
