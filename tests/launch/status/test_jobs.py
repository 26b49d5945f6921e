"""Jobs as stand-ins for squeue and sacct tell of them; tests/slurm asks the real ones."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import InputError
from launch.slurm.restarts import Decision, End, JobEvent, end_log, read_ends, write_end, write_job_event
from launch.status.jobs import SlurmJob, ask_queue, find_run_of, with_queue
from launch.status.run import read_status


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """slurm(squeue="shell text", sacct="shell text"): what the two do."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin")

    def install(**programs: str) -> None:
        for name, text in programs.items():
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)

    return install


UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def queue_line(job: str, state: str, reason: str = "None", folder: str = "/w", script: str = "/w/a.sh") -> str:
    return "printf '%s\\n' '" + "\x1f".join((job, state, reason, "n[1-2]", "a|b", folder, script)) + "'"


def test_what_waits_and_runs_is_read_whatever_a_name_holds(slurm: Callable[..., None]) -> None:
    slurm(squeue=queue_line("12", "PENDING", "DependencyNeverSatisfied", "/w|x"))
    assert ask_queue(["12"]) == [
        SlurmJob("12", "PENDING", "DependencyNeverSatisfied", "n[1-2]", Path("/w|x"), "/w/a.sh")
    ]


@pytest.mark.parametrize("squeue, told", [(UNKNOWN, []), ("echo no controller >&2; exit 1", None)])
def test_a_queue_without_the_job_is_another_thing_than_no_answer(
    squeue: str, told: list | None, slurm: Callable[..., None]
) -> None:
    slurm(squeue=squeue)
    assert ask_queue(["12"]) == told


def test_a_job_leads_to_the_run_that_has_noted_it(
    make_run: Callable[..., Path], slurm: Callable[..., None], tmp_path: Path
) -> None:
    slurm(squeue=UNKNOWN, sacct="exit 1")
    make_run("a", job="11")
    run = make_run("b", job="12")
    assert find_run_of("12", tmp_path / "runs") == run
    with pytest.raises(InputError, match=r"job 13: no run in .*runs has had it\. Give the run's folder"):
        find_run_of("13", tmp_path / "runs")


def test_a_job_leads_to_the_run_that_its_script_lies_in(
    make_run: Callable[..., Path], slurm: Callable[..., None], tmp_path: Path
) -> None:
    run = make_run("a")
    slurm(squeue=queue_line("12", "RUNNING", script=f"{run}/slurm/train.sbatch"))
    assert find_run_of("12", tmp_path / "elsewhere") == run


def test_a_job_of_the_past_leads_to_runs_where_it_was_submitted(
    make_run: Callable[..., Path], slurm: Callable[..., None], tmp_path: Path
) -> None:
    run = make_run("a", job="12")
    slurm(squeue=UNKNOWN, sacct=f"echo {tmp_path}")
    assert find_run_of("12", tmp_path / "elsewhere") == run


@pytest.mark.parametrize(
    "queued, age, state, reason",
    [
        (None, 0, "running", ""),
        ([("RUNNING", "None")], 0, "running", ""),
        ([("RUNNING", "None")], 9999, "silent", "job 12 runs on n[1-2] and writes nothing: it hangs"),
        ([("PENDING", "Priority")], 0, "waiting", "job 12 is pending: Priority"),
        ([], 0, "failed", "job 12 is gone, and left no outcome"),
    ],
)
def test_the_queue_corrects_what_the_folder_tells(
    queued: list | None, age: float, state: str, reason: str, make_run: Callable[..., Path]
) -> None:
    run = make_run("a", age=age)
    write_job_event(run, JobEvent("12", "started", "n[1-2]"))
    jobs = None if queued is None else [SlurmJob("12", held, why, "n[1-2]", Path("/w"), "") for held, why in queued]
    status = with_queue(read_status(run), jobs)
    assert (status.state, status.reason) == (state, reason)


@pytest.mark.parametrize("code, state", [(75, "stopped"), (1, "failed")])
def test_a_job_that_left_an_outcome_and_was_not_started_again_is_told_by_it(
    code: int, state: str, make_run: Callable[..., Path]
) -> None:
    """It had asked for its restart, which was refused, or the next job of its chain was cancelled."""
    run = make_run("a", outcome={"code": code, "reason": "so", "step": 40}, job="12")
    write_end(end_log(run, "train", "12"), End("12", 0, code, "so", 0, 40, "restart"))
    assert with_queue(read_status(run), None).state == "waiting"
    status = with_queue(read_status(run), [])
    assert (status.state, status.reason) == (state, "job 12 is gone, not started again; so")


def test_a_run_that_has_finished_stays_so(make_run: Callable[..., Path]) -> None:
    run = make_run("a", outcome={"code": 0, "reason": "done", "step": 40}, job="12")
    assert with_queue(read_status(run), []).state == "finished"


def test_a_run_that_goes_on_by_hand_is_not_its_old_jobs(make_run: Callable[..., Path]) -> None:
    run = make_run("a", job="12")
    write_end(end_log(run, "train", "12"), End("12", 0, 2, "bad input", 0, 0, "stop"))
    over = read_ends(end_log(run, "train", "12"))[0].time
    os.utime(run / "metrics.jsonl", (over + 30, over + 30))
    status = with_queue(read_status(run, over + 40), [])
    assert (status.state, status.job) == ("running", None)


@pytest.mark.parametrize("decision", ["restart", "stop"])
def test_a_run_that_nobody_went_on_with_is_its_jobs(decision: Decision, make_run: Callable[..., Path]) -> None:
    run = make_run("a", job="12", age=60)
    write_end(end_log(run, "train", "12"), End("12", 0, 1, "so", 0, 0, decision))
    status = with_queue(read_status(run), [])
    assert status.state == "failed" and status.job is not None
