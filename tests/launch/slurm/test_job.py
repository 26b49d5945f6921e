"""How a job ends, beside stand-ins for srun and scontrol; tests/slurm runs it in jobs of a real SLURM."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import StorageFailed
from data.storage.run_lock import take_run_folder
from launch.slurm import controller, job
from launch.slurm.restarts import End, read_ends, write_end
from tests.launch.slurm.stand_ins import RUNNING, ends_with


@pytest.mark.parametrize("code, requeued", [(0, False), (1, True), (2, False), (3, False), (75, True)])
def test_the_code_is_the_outcomes_and_what_may_go_on_is_requeued(
    code: int, requeued: bool, run_job: Callable[..., int], tmp_path: Path
) -> None:
    assert run_job(srun=ends_with(tmp_path, code, 4)) == code
    assert (tmp_path / "requeued").exists() == requeued


def test_nodes_that_do_not_hear_of_a_failure_are_told_to_stop(
    run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has failed before the others could meet it: srun waits for them, and nothing else tells them."""
    monkeypatch.setattr(job, "OTHER_NODES_SECONDS", 0.1)
    told = ends_with(tmp_path, 1, None).removesuffix("exit 1")
    assert run_job(srun=f"trap 'touch {tmp_path}/heard; exit 1' USR1; {told} while :; do sleep 0.1; done") == 1
    assert (tmp_path / "heard").exists() and (tmp_path / "requeued").read_text() == "12\n"


def test_a_second_job_of_a_run_touches_nothing_ends_with_3_and_is_not_requeued(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r" / "outcome.json").write_text("the first one's")
    lock = take_run_folder(tmp_path / "r", {"SLURM_JOB_ID": "11"}, supervisor="the batch script")  # without a heartbeat
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()}
    assert run_job(srun=f"touch {tmp_path}/started") == 3
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()} == before
    lock.end()
    told = capfd.readouterr().err
    assert "another start of this run (job 11, the batch script, process" in told and "is not started again" in told
    assert not (tmp_path / "requeued").exists() and not (tmp_path / "started").exists()


def test_a_job_whose_folder_was_taken_meanwhile_leaves_its_outcome_to_the_other(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    taken = f"sed s/owner-1/owner-2/ {tmp_path}/r/owner-1.json > {tmp_path}/r/owner-2.json"
    assert run_job(srun=f"{taken}; {ends_with(tmp_path, 1, 4)}") == 3
    assert "taken for dead" in capfd.readouterr().err
    assert not (tmp_path / "requeued").exists() and not list((tmp_path / "r" / "slurm").glob("train-*"))


def test_rank_0_is_told_whom_to_join(run_job: Callable[..., int], tmp_path: Path) -> None:
    assert run_job(srun=f'echo "$FLUXFILL_OWNER" > {tmp_path}/told; {ends_with(tmp_path, 0, 4)}') == 0
    owner = json.loads((tmp_path / "r" / "owner-1.json").read_text())
    assert (tmp_path / "told").read_text() == f"{owner['id']}\n" and (owner["job"], owner["ended"]) == ("12", True)


def test_an_end_of_srun_with_0_and_no_word_of_the_trainer_is_a_failure(
    run_job: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "r" / "outcome.json").write_text('{"code": 0, "reason": "done", "step": 9}')  # of an earlier start
    assert run_job(srun="exit 0") == 1
    assert (tmp_path / "requeued").read_text() == "12\n"


@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_a_step_can_hear_it_stops_the_job_before_that_and_it_starts_again(
    number: signal.Signals, ignored: bool, run_job: Callable[..., int], tmp_path: Path
) -> None:
    """It comes while the job asks the controller about itself; batch scripts ignore signals until there."""
    told = RUNNING + f'"; [ -e {tmp_path}/told ] || kill -{number} $PPID; : > {tmp_path}/told; : "'
    assert run_job(srun=f"touch {tmp_path}/started", told=told, ignored=number if ignored else 0) == 75
    assert not (tmp_path / "started").exists()
    assert (tmp_path / "requeued").read_text() == "12\n"


def test_a_time_limit_that_comes_after_the_save_does_not_keep_a_job_from_its_restart(
    run_job: Callable[..., int], tmp_path: Path
) -> None:
    """SLURM's TERM reaches the job while it asks the controller about itself."""
    told = RUNNING + '"; [ -e ' + f"{tmp_path}/saved" + ' ] && kill -TERM $PPID; : "'
    assert run_job(srun=f"touch {tmp_path}/saved; {ends_with(tmp_path, 75, 4)}", told=told, ignored=0) == 75
    assert (tmp_path / "requeued").read_text() == "12\n"


def test_the_config_has_the_last_word_on_the_path_of_a_step(run_job: Callable[..., int], tmp_path: Path) -> None:
    srun = f'echo "$PATH" > {tmp_path}/path; {ends_with(tmp_path, 0, 4)}'
    run_job(f"slurm.env={{PATH: '{tmp_path}:/odd:/usr/bin:/bin'}}", srun=srun)
    assert (tmp_path / "path").read_text().split(":")[1:3] == [f"{tmp_path}", "/odd"]


def test_a_run_folder_that_cannot_be_written_is_bad_input(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r" / "slurm" / "jobs.jsonl").mkdir(parents=True)
    assert run_job(srun=f"touch {tmp_path}/started") == 2
    assert "cannot be written" in capfd.readouterr().err and not (tmp_path / "started").exists()


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_job_whose_disk_fails_ends_with_1_and_starts_again(
    where: str, run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; or when the end is to be noted, which is left out."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def refuse_log(log: Path, _: object) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", refuse)
            write_end(log, End("12", 0, 1, "so", 0, 0, "restart"))

    if where == "before":
        monkeypatch.setattr("os.fsync", refuse)
    else:
        monkeypatch.setattr(job, "write_end", refuse_log)
    assert run_job(srun=ends_with(tmp_path, 1, 4)) == 1
    assert (tmp_path / "requeued").read_text() == "12\n"


@pytest.mark.parametrize("restarts, requeued", [(3, True), (4, False)])
def test_a_job_whose_folder_stays_full_does_not_start_again_for_ever(
    restarts: int, requeued: bool, run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be noted there; SLURM has counted the starts. One end was noted before the disk was full."""

    def refuse(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = tmp_path / "r" / "slurm" / "train-12.jsonl"
    write_end(log, End("12", 0, 75, "so", 0, 3, "restart"))
    monkeypatch.setattr("os.fsync", refuse)
    told = RUNNING.replace("Restarts=0", f"Restarts={restarts + 1}")
    assert run_job("slurm.max_restarts=3", srun=f"touch {tmp_path}/started", told=told) == 1
    assert (tmp_path / "requeued").exists() == requeued and not (tmp_path / "started").exists()


@pytest.mark.fault(24, "jobs whose run folder cannot even be read")
def test_a_job_whose_folder_cannot_be_read_does_not_start_again_for_ever(
    run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows there how many ends were noted, so SLURM is told; a start that can read forgets them."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    told, most = RUNNING.replace("Comment=x", "Comment=$(cat noted)"), ("slurm.max_restarts=2",)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noted").write_text("mine")
    for number in (1, 2, 3):
        with monkeypatch.context() as patched:
            patched.setattr("launch.slurm.job.read_ends", refuse)
            assert run_job(*most, srun=f"touch {tmp_path}/started", told=told) == 1
        if number < 3:
            assert (tmp_path / "updated").read_text() == f"JobId=12 Comment=mine fluxfill:unread={number}\n"
            (tmp_path / "noted").write_text(f"mine fluxfill:unread={number}")
            (tmp_path / "updated").unlink()
        assert len((tmp_path / "requeued").read_text().splitlines()) == min(number, 2)
    assert f"3 starts in a row could not read {tmp_path}/r (Input/output error" in capfd.readouterr().err
    assert not (tmp_path / "started").exists() and not (tmp_path / "updated").exists()
    assert run_job(*most, srun=ends_with(tmp_path, 0, 4), told=told) == 0
    assert (tmp_path / "updated").read_text() == "JobId=12 Comment=mine\n"


def test_bad_input_is_not_started_again_though_its_end_could_not_be_noted(
    run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(log: Path, _: object) -> None:
        raise StorageFailed(f"{log}: cannot be written")

    monkeypatch.setattr(job, "write_end", refuse)
    assert run_job(srun=ends_with(tmp_path, 2, None)) == 2
    assert not (tmp_path / "requeued").exists()


def test_a_disk_that_does_not_answer_when_a_job_ends_has_not_lost_the_folder(
    run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("data.storage.run_lock.RunLock.refuse_loss", refuse)
    assert run_job(srun=ends_with(tmp_path, 75, 4)) == 75
    assert (tmp_path / "requeued").exists()
    assert read_ends(tmp_path / "r" / "slurm" / "train-12.jsonl")[-1].decision == "restart"


def test_a_task_of_an_array_requeues_itself_alone(run_job: Callable[..., int], tmp_path: Path) -> None:
    told = RUNNING.replace("JobId=12 ", "JobId=12 ArrayJobId=12 ArrayTaskId=3 ")
    assert run_job(f"data.cache={tmp_path}", work="preprocess", srun="exit 1", told=told) == 1
    assert (tmp_path / "requeued").read_text() == "12_3\n"


def test_a_job_that_is_being_cancelled_stays_so(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = RUNNING.replace("RUNNING", "COMPLETING")
    assert run_job(srun=ends_with(tmp_path, 75, 4), told=told) == 75
    assert not (tmp_path / "requeued").exists()
    assert "being cancelled or requeued from outside" in capfd.readouterr().err


def test_a_job_that_may_not_be_requeued_says_so_at_its_start(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_job(srun=ends_with(tmp_path, 0, 4), told=RUNNING.replace("Requeue=1", "Requeue=0"))
    assert "this job may not be requeued (Requeue=0, by --no-requeue or SBATCH_NO_REQUEUE)" in capfd.readouterr().err


def test_a_job_whose_starts_are_lost_with_their_nodes_stops_before_it_takes_another(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lost = RUNNING.replace("Restarts=0", "Restarts=4")
    assert run_job(srun=f"touch {tmp_path}/started", told=lost) == 1
    assert not (tmp_path / "started").exists() and not (tmp_path / "requeued").exists()
    assert "4 starts in a row came no further than 0" in capfd.readouterr().err


def test_gpus_that_encode_for_the_others_are_not_trained_on(run_job: Callable[..., int], tmp_path: Path) -> None:
    srun = f'echo "$@" > {tmp_path}/asked; {ends_with(tmp_path, 0, 4)}'
    run_job("data.mode=online", "data.encoder_devices=[cuda:1]", srun=srun)
    asked = (tmp_path / "asked").read_text()
    assert "--gpus-per-node=2" in asked and "--processes 1 " in asked


def test_bad_input_is_a_message_and_exit_code_2(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job("train.lr=fast") == 2
    assert "train.lr is" in capfd.readouterr().err
    assert not (tmp_path / "requeued").exists()


def test_training_starts_when_the_preflight_finds_nothing_wrong(run_job: Callable[..., int], tmp_path: Path) -> None:
    result = {"code": 0, "reason": "fine", "bad_nodes": []}
    (tmp_path / "r" / "outcome.json").write_text('{"code": 75, "reason": "stopped", "step": 4}')  # of an earlier start
    assert run_job(srun=ends_with(tmp_path, 0, 4), preflight=result) == 0
    assert (tmp_path / "trained").exists()
    assert "outcome.json" not in (tmp_path / "seen").read_text(), "status would take the job for stopped meanwhile"


def test_bad_input_that_the_preflight_finds_ends_the_job_before_it_trains(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job(preflight={"code": 2, "reason": "preflight: no cache", "bad_nodes": ["n1"]}) == 2
    assert not any((tmp_path / name).exists() for name in ("trained", "requeued", "updated"))
    assert "preflight: no cache" in capfd.readouterr().err
    told = json.loads((tmp_path / "r" / "outcome.json").read_text())
    assert told == {"code": 2, "reason": "preflight: no cache", "step": None}


def test_a_job_starts_again_without_a_broken_node_and_those_that_it_was_not_to_get_anyway(
    run_job: Callable[..., int], tmp_path: Path
) -> None:
    told = RUNNING.replace("Comment", "ExcNodeList=n7 Comment")
    assert run_job(preflight={"code": 1, "reason": "n1: 1 of 2 GPUs answer", "bad_nodes": ["n1"]}, told=told) == 1
    assert not (tmp_path / "trained").exists()
    assert (tmp_path / "requeued").read_text() == "12\n"
    assert (tmp_path / "updated").read_text() == "JobId=12 ExcNodeList=n7,n1\n"


def test_a_preflight_that_leaves_no_result_is_a_failure(run_job: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "r" / "slurm").mkdir()
    (tmp_path / "r" / "slurm" / "preflight.json").write_text('{"result": {"code": 0, "reason": "", "bad_nodes": []}}')
    assert run_job("slurm.preflight=true", srun="exit 0") == 1, "the file is of an earlier start"


def test_an_engine_of_one_process_on_several_gpus_is_bad_input(run_job: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "r" / "outcome.json").write_text('{"code": 75, "reason": "stopped", "step": 9}')  # of an earlier start
    assert run_job("parallel.engine=single", srun=f"touch {tmp_path}/started") == 2
    assert not (tmp_path / "started").exists()
    told = json.loads((tmp_path / "r" / "outcome.json").read_text())
    assert told["code"] == 2 and "2 GPUs are to train, but parallel.engine is single" in told["reason"]
    assert read_ends(tmp_path / "r" / "slurm" / "train-12.jsonl")[-1].decision == "stop"


def test_nodes_of_a_preflight_get_a_token_of_this_start_and_no_gpus_of_an_outer_job(
    run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "2")
    token = f'echo "$FLUXFILL_PREFLIGHT_TOKEN ${{SLURM_GPUS-none}}" >> {tmp_path}/said'
    said = f'echo "$*" | grep -q " preflight " && {token}'
    for _ in range(2):
        monkeypatch.setenv("SLURM_GPUS", "4")
        run_job("slurm.preflight=true", srun=f"{said}; exit 0")
    (first, no_gpus), (second, _) = (line.split() for line in (tmp_path / "said").read_text().splitlines())
    assert len(first) == len(second) == 32 and first != second and no_gpus == "none"


def test_a_controller_that_is_away_when_the_job_ends_is_asked_again_for_the_restart(
    run_job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(controller, "FIRST_PAUSE_SECONDS", 0.01)
    away = f"[ -e {tmp_path}/saved ] && ! [ -e {tmp_path}/back ] && touch {tmp_path}/back && "
    away += "echo 'Unable to contact slurm controller (connect failure)' >&2 && exit 1"
    told = f'"; {away}; echo "{RUNNING}'
    assert run_job(srun=f"touch {tmp_path}/saved; {ends_with(tmp_path, 75, 4)}", told=told) == 75
    assert (tmp_path / "requeued").read_text() == "12\n"
    assert "asked again in 0.01 s" in capfd.readouterr().err


def test_a_job_that_encodes_shards_again_in_their_places_has_come_further(
    run_job: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index" / "photos").mkdir(parents=True)
    index = tmp_path / "index" / "photos" / "64x64-000000.index"
    index.touch()
    os.utime(index, (1, 1))
    given = (f"data.cache={tmp_path}", "slurm.max_restarts=0")
    assert run_job(*given, work="preprocess", srun=f"touch {index}; exit 1") == 1
    assert (
        tmp_path / "requeued"
    ).exists() and "goes on from 1 of the shards that this job finishes" in capfd.readouterr().err
    (tmp_path / "requeued").unlink()
    restarted = RUNNING.replace("Restarts=0", "Restarts=1")
    assert run_job(*given, work="preprocess", srun="exit 1", told=restarted) == 1
    assert not (tmp_path / "requeued").exists()
    assert "came no further than 1 of the shards that this job finishes" in capfd.readouterr().err
