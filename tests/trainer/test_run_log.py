import io
import json
import logging
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.loading import load_config
from tests.ranks import run_ranks
from trainer.checkpoints.run_state import RunState
from trainer.engines.base import Update
from trainer.engines.ranks import Ranks
from trainer.run_log import RunLog, configure_logging
from trainer.training_data import choose_order, open_stream

GOOD = Update(loss=0.5, grad_norm=1.25, applied=True)
FIGURES = {"hole_psnr": 11.0, "hole_psnr_ceiling": 24.0, "loss_sigma_0.5": 1.5}


@pytest.fixture
def run(config, tmp_path):
    """The config of a run in tmp_path."""
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "logged"})})


@pytest.fixture
def start(run, engine, samples):
    """start(step, restarts): a run log and its stream, as a process that begins there has them."""
    opened: list = []

    def begin(step: int, restarts: int = 0):
        order = choose_order(run, samples)
        state = RunState(step=step, batch=step, skips=0, restarts=restarts, order=order)
        stream = open_stream(run, engine, samples, state, 16)
        log = RunLog(run, engine, state, Console(file=io.StringIO()))
        opened.extend([stream, log])
        return log, stream, state

    yield begin
    for thing in opened:
        thing.close()


def advance(log, stream, state, updates):
    for update in updates:
        next(stream)
        state = state.after(update)
        log.step(state, update, 1e-3, stream)
    return state


def lines(run, name: str) -> list[dict]:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    path = run.run.folder / name
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_every_step_is_a_line_with_its_figures(run, start):
    advance(*start(0), updates=[GOOD, GOOD])
    first, second = lines(run, "metrics.jsonl")
    assert [first["step"], second["step"]] == [1, 2]
    assert (first["loss"], first["grad_norm"], first["lr"], first["epoch"]) == (0.5, 1.25, 1e-3, 0)
    assert second["samples"] == 2 * run.train.global_batch_size
    assert 0 <= first["data_wait_seconds"] <= first["seconds"]
    assert first["samples_per_second"] == pytest.approx(run.train.global_batch_size / first["seconds"], rel=0.05)


def test_the_peak_of_memory_is_each_steps_own(run, start, monkeypatch):
    """Not that of the start, or of a validation in between."""
    held = [50 * 2**30]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: max(held))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", held.clear)
    log, stream, state = start(0)
    for gib in (21, 20.25):
        held.append(40 * 2**30)
        log.validation({"step": state.step, "train": dict(FIGURES)})
        held.append(int(gib * 2**30))
        state = advance(log, stream, state, [GOOD])
    assert [line["peak_memory_gib"] for line in lines(run, "metrics.jsonl")] == [21, 20.25]


def test_a_step_that_is_not_finite_is_valid_json(run, start):
    advance(*start(0), updates=[Update(loss=math.nan, grad_norm=math.inf, applied=False), GOOD])
    skipped, _ = lines(run, "metrics.jsonl")
    assert (skipped["loss"], skipped["grad_norm"]) == (None, None)


def test_the_config_in_the_run_folder_loads_as_the_same_config(run, start):
    start(0)
    assert load_config(run.run.folder / "config.yaml", []) == run


def test_resume_moves_the_undone_lines_aside(run, start):
    log, stream, state = start(0)
    advance(log, stream, state, [GOOD] * 5)
    log.validation({"step": 0, "train": dict(FIGURES)})
    log.validation({"step": 4, "train": dict(FIGURES)})
    log, stream, state = start(3, restarts=1)
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines(run, "metrics.1.jsonl")] == [4, 5]
    assert [line["step"] for line in lines(run, "validation.jsonl")] == [0]
    assert [line["step"] for line in lines(run, "validation.1.jsonl")] == [4]
    advance(log, stream, state, [GOOD])
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_rollback_moves_the_undone_lines_aside_and_is_on_the_progress_line(run, start, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    log, stream, state = start(0)
    bad = Update(math.nan, math.nan, applied=False)
    log.validation({"step": 0, "train": dict(FIGURES)})
    two = advance(log, stream, state, [GOOD, GOOD])
    advance(log, stream, two, [bad] * 3)
    log.go_back(replace(two, rollbacks=1, lr_scale=0.5))
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in lines(run, "metrics.1.jsonl")] == [3, 4, 5]
    assert [line["step"] for line in lines(run, "validation.jsonl")] == [0]
    every = run.train.steps // 30
    at = replace(two, step=every - 1, rollbacks=1, lr_scale=0.5, skipped=(1, 7))
    advance(log, stream, at, [GOOD])
    log.close()
    assert "  2 skipped  1 rolled back, lr x 0.5" in caplog.text
    events = EventAccumulator(str(run.run.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, every]


def test_two_starts_from_one_checkpoint_keep_both_sets_of_undone_lines(run, start):
    advance(*start(0), updates=[GOOD] * 4)
    advance(*start(2, restarts=1), updates=[GOOD] * 3)
    start(2, restarts=1)
    assert [line["step"] for line in lines(run, "metrics.1.jsonl")] == [3, 4]
    assert [line["step"] for line in lines(run, "metrics.2.jsonl")] == [3, 4, 5]


def test_a_fresh_start_begins_fresh_files(run, start):
    log, *_ = start(0)
    log.validation({"step": 0, "train": dict(FIGURES)})
    log, *_ = start(0)
    log.validation({"step": 0, "train": dict(FIGURES) | {"hole_psnr": 9.0}})
    log.validation({"step": 2, "train": dict(FIGURES)})
    assert [line["step"] for line in lines(run, "validation.jsonl")] == [0, 2]
    assert lines(run, "validation.jsonl")[1]["train"]["hole_psnr_untrained"] == 9.0


def test_the_line_of_a_killed_process_is_dropped(run, start):
    advance(*start(0), updates=[GOOD] * 3)
    path = run.run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "los')
    start(3, restarts=1)
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1, 2, 3]


def test_every_validation_carries_the_untrained_figure(run, start):
    log, *_ = start(0)
    for step, hole_psnr in ((0, 11.0), (5, 20.0)):
        log.validation({"step": step, "holdout": dict(FIGURES) | {"hole_psnr": hole_psnr}, "train": {}})
    log, *_ = start(5, restarts=1)
    log.validation({"step": 10, "holdout": dict(FIGURES) | {"hole_psnr": math.nan}, "train": {}})
    found = lines(run, "validation.jsonl")
    assert [line["holdout"]["hole_psnr_untrained"] for line in found] == [11.0] * 3
    assert [line["holdout"]["hole_psnr"] for line in found] == [11.0, 20.0, None]


def test_tensorboard_shows_each_step_once_after_a_resume(run, start):
    log, stream, state = start(0)
    advance(log, stream, state, [GOOD] * 5)
    log.close()
    log, stream, state = start(3, restarts=1)
    advance(log, stream, state, [Update(loss=0.25, grad_norm=1.0, applied=True)] * 4)
    log.close()
    events = EventAccumulator(str(run.run.folder / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.25, 5: 0.25, 6: 0.25, 7: 0.25}


def test_a_terminal_gets_a_bar_and_its_end(run, engine, samples):
    screen = io.StringIO()
    order = choose_order(run, samples)
    state = RunState(step=0, batch=0, skips=0, restarts=0, order=order)
    stream = open_stream(run, engine, samples, state, 16)
    log = RunLog(run, engine, state, Console(file=screen, force_terminal=True, width=100))
    advance(log, stream, state, [GOOD])
    log.close()
    stream.close()
    assert "loss 0.5000" in screen.getvalue()


@pytest.mark.parametrize("is_main, heard", [(True, ["told", "warned"]), (False, ["warned"])])
def test_ranks_but_the_first_only_warn(capsys, is_main, heard):
    log = logging.getLogger("fluxfill")
    before = log.handlers, log.propagate, log.level
    try:
        configure_logging(SimpleNamespace(is_main=is_main))
        log.info("told")
        log.warning("warned")
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == heard
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


def log_steps(folder: str, steps: int) -> None:
    """Steps of a rank that waits for data as many seconds as its number is."""
    config = load_config("configs/demo.yaml", [f"run.dir={folder}", "run.name=waits", "logging.trackers=[]"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    # Rank 1 computes three times as long as the others, but for the first steps, in which all of them compile.
    passes = iter([99.0 * (1 + rank)] * 5 + [3.0 if rank == 1 else 1.0] * steps)
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    place = {"name": "ddp", "world_size": ranks.world_size, "num_nodes": 1, "gpus": []}
    place["profile"] = SimpleNamespace(end=lambda: None)
    engine = SimpleNamespace(is_main=rank == 0, ranks=ranks, forward_seconds=lambda: next(passes), **place)
    log = RunLog(config, engine, SimpleNamespace(step=0, restarts=0), Console(file=io.StringIO()))
    for step in range(1, steps + 1):
        current = SimpleNamespace(epoch=0)
        stream = SimpleNamespace(batch_start=time.monotonic() - 9, wait_seconds=float(rank), current=current)
        log.step(SimpleNamespace(step=step, skipped=(), rollbacks=0), GOOD, 1e-3, stream)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def uneven_ranks(tmp_path_factory):
    """The folder of a run of three ranks, of which the last waits longest for data and the second computes slowest."""
    folder = tmp_path_factory.mktemp("uneven")
    run_ranks("ddp", 3, log_steps, str(folder), 65)
    return folder / "waits"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.fault(16, "a rank whose data comes later than the others'")
def test_the_rank_that_waits_longest_for_data_is_named_now_and_then(uneven_ranks):
    logged = read_lines(uneven_ranks / "metrics.jsonl")
    named = {line["step"]: line["slowest_rank"] for line in logged if "slowest_rank" in line}
    assert named == {step: {"rank": 2, "data_wait_seconds": 2.0, "median_seconds": 1.0} for step in (21, 41, 61)}


@pytest.mark.fault(16, "a rank whose forward and backward passes take longer than the others'")
def test_a_rank_that_computes_slowly_is_named_once_at_the_second_time(uneven_ranks):
    logged = read_lines(uneven_ranks / "metrics.jsonl")
    named = {line["step"]: line["slowest_forward"] for line in logged if "slowest_forward" in line}
    assert named == {step: {"rank": 1, "seconds": 3.0, "median_seconds": 1.0} for step in (21, 41, 61)}
    (event,) = read_lines(uneven_ranks / "events.jsonl")
    assert (event["event"], event["rank"], event["seconds"]) == ("straggler", 1, 3.0)


def test_tensorboard_on_a_full_disk_does_not_keep_a_run_from_going_back(run, start, monkeypatch):
    log, stream, state = start(0)
    state = advance(log, stream, state, [GOOD, GOOD])

    def close():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._tensorboard, "close", close)
    log.go_back(replace(state, step=1))
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1]
