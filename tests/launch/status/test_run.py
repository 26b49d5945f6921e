import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm.restarts import End, JobEvent, write_end, write_job_event
from launch.status.run import Rollback, SlowestForward, find_runs, is_run, read_status

FORMAT_V1 = Path(__file__).resolve().parents[2] / "trainer" / "checkpoints" / "format_v1"


def test_figures_of_a_run_that_trains(make_run: Callable[..., Path]) -> None:
    run = make_run("a", steps=40, checkpoint=25)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 0.5, "sec')  # the trainer is at it
    (run / "validation.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "holdout": {"hole_psnr": score, "hole_psnr_untrained": 11.0}, "train": {}}) + "\n"
            for step, score in ((0, 11.0), (20, 14.0), (40, None))
        )
    )
    status = read_status(run)
    assert (status.state, status.step, status.steps, status.loss) == ("running", 40, 4000, 0.5)
    assert (status.seconds_per_step, status.seconds_left) == (2.0, 3960 * 2.0)
    assert status.checkpoint is not None and (status.checkpoint.step, status.checkpoint.bytes) == (25, 1000)
    told = status.validation
    assert told is not None and (told.step, told.hole_psnr, told.best, told.best_step) == (40, None, 14.0, 20)


def test_the_best_validation_may_be_of_long_ago(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    figures = {f"loss_sigma_0.{digit}": 0.123456789 for digit in range(1, 10)}
    with (run / "validation.jsonl").open("w") as log:
        for step in range(0, 1_500_000, 250):
            scores = figures | {"hole_psnr": 25.0 if step == 2500 else 20.0}
            log.write(json.dumps({"step": step, "holdout": scores}) + "\n")
        log.write('{"step": 1500000, "hold')
        assert log.tell() > 1 << 20
    told = read_status(run).validation
    assert told is not None and (told.step, told.hole_psnr, told.best, told.best_step) == (1_499_750, 20.0, 25.0, 2500)


def test_rollbacks_are_those_among_the_events(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    assert read_status(run).rollbacks == ()
    events = [{"event": "skip", "step": 9}, {"event": "rollback", "step": 9, "to_step": 4, "lr_scale": 0.5}]
    (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in [*events, {"event": "stop"}]))
    assert read_status(run).rollbacks == (Rollback(9, 4, 0.5),)


@pytest.mark.parametrize(
    "code, state", [(0, "finished"), (75, "stopped"), (1, "failed"), (2, "refused"), ("x", "unknown")]
)
def test_the_state_is_that_of_the_outcome(code: object, state: str, make_run: Callable[..., Path]) -> None:
    run = make_run("a", outcome={"code": code, "reason": "so", "step": 40}, age=1e6)
    assert read_status(run).state == state


def test_a_finished_run_stays_finished_when_a_later_start_is_refused(make_run: Callable[..., Path]) -> None:
    """Not one that exported fewer steps, and went on."""
    run = make_run("a", outcome={"code": 2, "reason": "method.rank was 16", "step": None})
    assert read_status(run).state == "refused"
    for step, state in ((30, "refused"), (40, "finished")):
        (run / "events.jsonl").write_text(json.dumps({"event": "exported", "step": step}) + "\n")
        assert read_status(run).state == state
    assert "the last start was refused: method.rank was 16" in read_status(run).reason


@pytest.mark.parametrize(
    "reason, state",
    [
        ("step 40: 3 updates in a row were skipped. Lower train.lr", "failed"),
        ("rank 1: step 40: 3 updates in a row were skipped. Lower train.lr", "failed"),
        ("method.rank was 16", "refused"),  # of a later start
    ],
)
def test_a_run_that_the_guard_stopped_has_failed_and_a_start_after_it_may_be_refused(
    make_run: Callable[..., Path], reason: str, state: str
) -> None:
    """Both end with code 2, as no restart helps."""
    run = make_run("a", outcome={"code": 2, "reason": reason, "step": None})
    events = [{"event": "stop", "why": why} for why in ("step 9: of an earlier start", "step 40: 3 updates in a row")]
    events += [{"event": "exported", "step": 30}]
    (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    status = read_status(run)
    assert (status.state, status.reason) == (state, reason)


@pytest.mark.parametrize("age, pace, state", [(60, 1, "running"), (1000, 1, "silent"), (1000, 60, "running")])
def test_a_run_without_a_sign_of_life_is_silent(
    age: float, pace: float, state: str, make_run: Callable[..., Path]
) -> None:
    assert read_status(make_run("a", pace=pace, age=age)).state == state


def test_restarts_and_their_reasons_are_those_that_jobs_have_noted(make_run: Callable[..., Path]) -> None:
    run = make_run("a", outcome={"code": 75, "reason": "stopped by SIGUSR1", "step": 40}, job="12")
    write_end(run / "slurm" / "train-12.jsonl", End("12", 0, 75, "stopped by SIGUSR1", 0, 40, "restart"))
    status = read_status(run)
    assert [(restart.step, restart.reason) for restart in status.restarts] == [(40, "stopped by SIGUSR1")]
    assert (status.state, status.reason) == ("waiting", "starts again; stopped by SIGUSR1")
    write_job_event(run, JobEvent("12", "started", "n3", restarts=1))
    (run / "outcome.json").unlink()
    status = read_status(run)
    assert status.state == "running" and status.job is not None and status.job.nodes == "n3"


def test_a_job_that_was_submitted_and_has_not_begun_is_waiting(tmp_path: Path) -> None:
    write_job_event(tmp_path / "a", JobEvent("12", "submitted"))
    assert is_run(tmp_path / "a")
    assert (read_status(tmp_path / "a").state, read_status(tmp_path / "a").step) == ("waiting", None)


def test_steps_whose_update_was_not_finite_are_counted_and_left_out_of_the_mean(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": null, "grad_norm": null, "seconds": 2.0}\n')
    status = read_status(run)
    assert (status.skipped, status.loss, status.averaged) == (1, 0.5, 40)


def test_the_slowest_rank_is_the_last_one_that_was_named(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    assert read_status(run).slowest_rank is None
    told = {"rank": 3, "data_wait_seconds": 0.5, "median_seconds": 0.1}
    with (run / "metrics.jsonl").open("a") as file:
        forward = {"rank": 1, "seconds": 3.0, "median_seconds": 1.0}
        lines = [{"step": 41, "slowest_rank": told, "slowest_forward": forward}, {"step": 42}]
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    slowest = read_status(run).slowest_rank
    assert slowest is not None and dataclasses.astuple(slowest) == (3, 0.5, 0.1)
    assert read_status(run).slowest_forward == SlowestForward(1, 3.0, 1.0)


def test_a_run_with_a_checkpoint_of_an_older_version_has_a_status(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_V1 / "step-00000004", tmp_path / "a" / "checkpoints" / "step-00000004")
    status = read_status(tmp_path / "a")
    assert status.checkpoint is not None and (status.step, status.resumed) == (4, 0)
    folder = tmp_path / "a" / "checkpoints" / "step-00000004"
    shutil.copytree(folder, folder.with_name("step-00000008.undone"))
    assert read_status(tmp_path / "a").checkpoint == dataclasses.replace(
        status.checkpoint, age_seconds=pytest.approx(status.checkpoint.age_seconds, abs=600)
    )


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.yaml", "train: [not, a, section]\nrun: 3\n"),
        ("config.yaml", "{broken"),
        ("metrics.jsonl", '{"step": "four", "loss": "x", "seconds": null, "slowest_rank": {"r": 1}}\n'),
        ("validation.jsonl", '{"figures": 1}\n'),
        ("outcome.json", "{"),
        ("slurm/jobs.jsonl", '{"job": 1, "new": 2}\n'),
        ("slurm/train-1.jsonl", '{"job": 1, "new": 2}\n'),
    ],
)
def test_what_another_version_wrote_is_left_out(name: str, text: str, make_run: Callable[..., Path]) -> None:
    run = make_run("a", checkpoint=25)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(text)
    status = read_status(run)
    assert status.checkpoint is not None and status.checkpoint.step == 25


def test_what_cannot_be_read_is_named_and_the_rest_is_told(make_run: Callable[..., Path]) -> None:
    run = make_run("a", checkpoint=25)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()  # root, too, cannot read it
    status = read_status(run)
    assert status.unreadable == (str(run / "metrics.jsonl"),) and status.checkpoint is not None


def test_runs_are_found_at_any_depth_but_not_inside_of_others(make_run: Callable[..., Path], tmp_path: Path) -> None:
    plain = make_run("b", checkpoint=25)
    (tmp_path / "runs" / "team").mkdir()
    nested = make_run("a").rename(tmp_path / "runs" / "team" / "a")
    (tmp_path / "runs" / "linked").symlink_to(plain)
    found = find_runs(tmp_path / "runs")
    assert found == sorted([nested, plain, tmp_path / "runs" / "linked"])


def test_the_status_does_not_depend_on_this_machines_clock(make_run: Callable[..., Path]) -> None:
    status = read_status(make_run("a", checkpoint=25), now=time.time() - 86400)  # files from the future
    assert status.checkpoint is not None and status.checkpoint.age_seconds == 0
