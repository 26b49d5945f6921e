"""Who goes on after a job, itself or the next of its chain, and the notice where nobody does."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import job
from launch.slurm.job import CHAIN, CHAIN_LAST
from launch.slurm.restarts import End, read_ends, write_end
from tests.launch.slurm.stand_ins import RUNNING, ends_with


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(exit code, reason) of every notice."""
    notices: list[tuple[int, str]] = []
    monkeypatch.setattr(job, "notify_end", lambda run, *, code, reason, step: notices.append((code, reason)))
    return notices


@pytest.mark.parametrize("code, kinds", [(0, [0]), (1, []), (2, [2]), (75, [])])
def test_a_notice_is_sent_of_an_end_that_is_the_runs(
    code: int, kinds: list[int], run_job: Callable[..., int], tmp_path: Path, sent: list[tuple[int, str]]
) -> None:
    """Not where the job starts again."""
    run_job(srun=ends_with(tmp_path, code, 4))
    assert [code for code, _ in sent] == kinds


def test_a_chain_leaves_restarts_to_the_next_job_and_counts_them_together(
    run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHAIN, "c0")
    chain = ("slurm.chain=9", "slurm.max_restarts=1")
    assert run_job(*chain, srun=ends_with(tmp_path, 1, None)) == 1
    assert not (tmp_path / "requeued").exists()
    assert run_job(*chain, srun=ends_with(tmp_path, 1, None)) == 1
    assert run_job(*chain, srun=ends_with(tmp_path, 0, 9)) == 1, "the second had said that there is to be no third"


@pytest.mark.parametrize("work, chain", [("train", False), ("preprocess", False), ("preprocess", True)])
def test_a_job_that_no_other_follows_requeues_itself_whatever_the_config_says_of_chains(
    work: str, chain: bool, run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fluxfill slurm submit` alone makes a chain, and of training alone: a plain sbatch has no successor."""
    if chain:
        monkeypatch.setenv(CHAIN, "c0")
    code = run_job("slurm.chain=9", f"data.cache={tmp_path}", work=work, srun=ends_with(tmp_path, 1, 4))
    assert code == 1 and (tmp_path / "requeued").read_text() == "12\n"


@pytest.mark.parametrize("is_last", [False, True])
def test_the_last_job_of_a_chain_says_that_none_follows_and_sends_a_notice(
    is_last: bool,
    run_job: Callable[..., int],
    tmp_path: Path,
    sent: list[tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(CHAIN, "c0")
    if is_last:
        monkeypatch.setenv(CHAIN_LAST, "1")
    assert run_job("slurm.chain=2", srun=ends_with(tmp_path, 75, 4)) == 75
    assert not (tmp_path / "requeued").exists()
    [end] = read_ends(tmp_path / "r" / "slurm" / "train-c0.jsonl")
    said = capfd.readouterr().err
    if not is_last:
        assert (sent, end.decision) == ([], "restart") and "restart 1 of 3" in said
        return
    reason = "so: this is the last job of its chain, and none follows; submit the run again: it goes on from 0"
    assert (sent, end.decision) == ([(75, reason)], "stop") and reason in said and "restart 1 of 3" not in said


@pytest.mark.parametrize("chain, requeued, notices", [("", True, 0), ("one of it", False, 0), ("the last", False, 1)])
def test_a_job_of_a_chain_whose_disk_fails_leaves_the_restart_to_the_next_if_there_is_one(
    chain: str,
    requeued: bool,
    notices: int,
    run_job: Callable[..., int],
    tmp_path: Path,
    sent: list[tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if chain:
        monkeypatch.setenv(CHAIN, "c0")
    if chain == "the last":
        monkeypatch.setenv(CHAIN_LAST, "1")
    monkeypatch.setattr("os.fsync", refuse)
    assert run_job("slurm.chain=9", srun=ends_with(tmp_path, 1, 4)) == 1
    assert (tmp_path / "requeued").exists() == requeued and len(sent) == notices
    assert all("the last job of its chain" in reason for _, reason in sent)


def test_a_job_whose_restart_is_refused_sends_a_notice(
    run_job: Callable[..., int], tmp_path: Path, sent: list[tuple[int, str]]
) -> None:
    """As where a site forbids it."""
    told = f'"; [ "$1" = requeue ] && echo "Access/permission denied" >&2 && exit 1; echo "{RUNNING}'
    (tmp_path / "requeued").mkdir()  # the stand-in's own answer fails, and what is told comes to its turn
    assert run_job(srun=ends_with(tmp_path, 75, 4), told=told) == 75
    [(code, reason)] = sent
    assert code == 75 and "not started again, submit it again" in reason and "permission denied" in reason


def test_a_job_whose_starts_were_lost_sends_a_notice_when_it_stops(
    run_job: Callable[..., int], sent: list[tuple[int, str]]
) -> None:
    assert run_job(told=RUNNING.replace("Restarts=0", "Restarts=4")) == 1
    assert [code for code, _ in sent] == [1] and "4 starts in a row came no further" in sent[0][1]


@pytest.mark.parametrize("code, decision", [(0, "done"), (2, "stop")])
def test_the_rest_of_a_chain_ends_as_the_run_did(
    code: int, decision: str, run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHAIN, "c0")
    write_end(tmp_path / "r" / "slurm" / "train-c0.jsonl", End("11", 0, code, "so", 0, 9, decision))
    assert run_job("slurm.chain=9", srun=f"touch {tmp_path}/started") == code
    assert not (tmp_path / "started").exists()
