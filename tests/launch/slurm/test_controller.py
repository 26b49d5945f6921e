from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import InputError
from launch.slurm import controller
from launch.slurm.controller import Job, parse_job

# As SLURM 22.05 prints them; tests/slurm asks a real one.
RUNNING = (
    "JobId=12 JobName=a b UserId=me(1) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=3 BatchFlag=1 "
    "RunTime=00:01:00 TimeLimit=1-00:00:00 StdOut=/a.log Comment=Requeue=0 Restarts=9"
)


def test_a_job_is_read_from_the_controllers_line() -> None:
    assert parse_job(RUNNING) == Job("12", 3, may_requeue=True, is_ending=False, comment="Requeue=0 Restarts=9")
    assert not parse_job(RUNNING.replace("Requeue=1", "Requeue=0", 1)).may_requeue


def test_a_task_of_an_array_is_named_by_the_array_never_by_its_number() -> None:
    assert parse_job(RUNNING.replace("JobId=12 ", "JobId=12 ArrayJobId=12 ArrayTaskId=7 ")).id == "12_7"


@pytest.mark.parametrize(
    "run_time, limit, is_ending",
    [
        ("00:01:00", "1-00:00:00", True),  # scancel
        ("00:01:00", "UNLIMITED", True),
        ("1-00:00:03", "1-00:00:00", False),  # its time is up: it may start again
    ],
)
def test_a_job_that_somebody_ends_is_told_from_one_whose_time_is_up(run_time: str, limit: str, is_ending: bool) -> None:
    line = RUNNING.replace("JobState=RUNNING", "JobState=COMPLETING")
    line = line.replace("00:01:00", run_time).replace("TimeLimit=1-00:00:00", f"TimeLimit={limit}")
    assert parse_job(line).is_ending == is_ending


@pytest.mark.parametrize("told, expected", [("(null)", "n3,n4"), ("n[1-2]", "n[1-2],n3,n4")])
def test_nodes_are_excluded_beside_those_that_are_already(
    told: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job = parse_job(RUNNING.replace("Comment", f"ExcNodeList={told} Comment"))
    controller.exclude_nodes(job, ["n3", "n4"])
    assert (tmp_path / "asked").read_text() == f"update JobId=12 ExcNodeList={expected}\n"


@pytest.mark.parametrize("comment", ["(null)", "", "mine, x=1"])
def test_starts_that_read_nothing_are_counted_behind_the_users_comment(
    comment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is that of SLURM 22.05, where files follow the comment."""
    program = f'#!/bin/sh\n[ "$1" = update ] && echo "${{3#Comment=}}" > {tmp_path}/comment && exit 0\n'
    program += (
        f'echo "{RUNNING.partition(" StdOut")[0]} Comment=$(cat {tmp_path}/comment)  StdErr=/a StdOut=/b Power="\n'
    )
    (tmp_path / "scontrol").write_text(program)
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "comment").write_text(comment)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for count in (1, 2, 0):
        found = controller.show_job("12")
        assert found is not None
        controller.note_unread(found, count)
        found = controller.show_job("12")
        assert found is not None and found.unread == count
        assert found.comment == comment.replace("(null)", "")


def test_of_an_array_only_the_jobs_own_line_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{RUNNING.replace('=12 ', '=13 ', 1)}'\necho '{RUNNING}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = controller.show_job("12")
    assert found is not None and found.id == "12"
    assert controller.show_job("99") is None


def test_without_scontrol_nothing_is_known_and_nothing_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert controller.show_job("12") is None
    with pytest.raises(InputError, match=r"scontrol requeue 12: .*scontrol"):
        controller.requeue("12")


AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def count_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], Callable[[], int]]:
    """count_calls(fails, said): a scontrol that fails so often with these words, and then prints a job; how often it
    was called."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(controller, "FIRST_PAUSE_SECONDS", 0.01)

    def make(fails: int, said: str) -> Callable[[], int]:
        (tmp_path / "scontrol").write_text(
            f"#!/bin/sh\necho >> {tmp_path}/calls\n"
            f"[ $(wc -l < {tmp_path}/calls) -le {fails} ] && echo '{said}' >&2 && exit 1\necho '{RUNNING}'\n"
        )
        (tmp_path / "scontrol").chmod(0o755)
        return lambda: len((tmp_path / "calls").read_text().splitlines())

    return make


def test_a_controller_that_is_away_for_a_moment_is_asked_again(
    count_calls: Callable[[int, str], Callable[[], int]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = count_calls(3, AWAY)
    controller.requeue("12")
    assert calls() == 4
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and AWAY in said[0]
    assert [line.partition("asked again in ")[2] for line in said] == ["0.01 s", "0.02 s", "0.04 s"]


def test_a_controller_that_stays_away_is_given_up(
    count_calls: Callable[[int, str], Callable[[], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]  # sleeping alone takes time: how long the stand-in does is the machine's affair
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(controller, "time", clock)
    calls = count_calls(1_000_000, AWAY)
    with pytest.raises(InputError, match="Unable to contact slurm controller"):
        controller.requeue("12")
    assert calls() > 1
    assert controller.show_job("12") is None


def test_what_a_controller_refuses_is_asked_once(count_calls: Callable[[int, str], Callable[[], int]]) -> None:
    calls = count_calls(1_000_000, "Job/step already completing or completed for job 12")
    with pytest.raises(InputError, match="already completing"):
        controller.requeue("12")
    assert calls() == 1
