"""Stopping on purpose: real launches, real signals. The run saves, ends with 75, and goes on as if nothing had been."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.supervision import list_children_of
from data.cache.open_cache import Cache
from launch.supervise import Outcome
from tests.data.batches.streams import damage
from tests.holding import HOLD, go_file, held_file
from tests.patience import PATIENCE
from tests.ranks import run_ranks
from tests.trainer.launches import launch

ROOT = Path(__file__).parents[3]
STEPS = 40
# A run's rank 0 waits there, before it logs its next step, until it has heard a stop signal or the test lets it go on.
HELD_AT = 3

# In the run's second save, once its tensors are written, `fluxfill train` is told to stop; the save ends no more.
_STALLS = """
import os, pathlib, signal, time
import trainer.checkpoints.save as save
real, calls = save.write_tensors, []
def stalling(*given):
    real(*given)
    calls.append(1)
    if len(calls) == 2:
        launcher = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text()
        os.kill(int(launcher.rpartition(")")[2].split()[1]), signal.SIGTERM)
        time.sleep(600)
save.write_tensors = stalling
"""


def train(arguments: list[str]) -> int:
    from trainer.main import train

    return train(arguments)


@pytest.fixture(scope="module")
def settings(config, tmp_path_factory):
    """The config's file and overrides of a run: `settings(name)`; below one folder."""
    from configs.loading import dump_config

    folder = tmp_path_factory.mktemp("stopped")
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")

    def make(name: str) -> tuple[Path, list[str], Path]:
        given = [f"run.dir={folder}", f"run.name={name}", f"train.steps={STEPS}", "train.global_batch_size=4"]
        given += ["train.micro_batch_size=2", "train.warmup_steps=5", "validation.every_steps=null"]
        given += ["checkpoint.every_steps=null", "logging.trackers=[]", "data.preprocess=never"]
        return path, given, folder / name

    return make


@pytest.fixture
def start(settings):
    """Starts `fluxfill train` as a user does: `start(name, processes)`; returns (process, run's folder). What a failed
    test leaves is ended: first those who start others."""
    started = []

    def run(name: str, num_processes: int, *overrides: str) -> tuple[subprocess.Popen, Path]:
        path, given, folder = settings(name)
        line = [sys.executable, "-c", "from launch.cli import main; main()", "train", str(path), *given, *overrides]
        engine = ["--num-processes", str(num_processes)]
        held = {"HOLD_AT": str(HELD_AT), "HOLD_UNTIL": str(go_file(folder)), "HOLD_UNTIL_STOPPED": "1"}
        environment = {**os.environ, **held, "PYTHONPATH": f"{HOLD}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*line, *engine], env=environment, cwd=folder.parent, stdout=subprocess.PIPE, text=True
        )
        started.append((process, folder))
        return process, folder

    yield run
    for process, folder in started:
        go_file(folder).touch()  # for a rank whose launcher is gone
        if process.poll() is None:
            processes = [process.pid]
            for parent in processes:
                processes += list_children_of(parent)
            for pid in processes:
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def run_warm(settings):
    """The same run in ranks that need not import anything: `run_warm(name, processes)`; returns its folder."""

    def run(name: str, num_processes: int) -> Path:
        path, given, folder = settings(name)
        run_ranks("single" if num_processes == 1 else "ddp", num_processes, train, ["--config", str(path), *given])
        return folder

    return run


@pytest.fixture(scope="module")
def undisturbed(run_warm):
    """The folder of the run that nothing happened to: `undisturbed(processes)`, made once."""
    return functools.cache(lambda num_processes: run_warm(f"undisturbed-{num_processes}", num_processes))


def wait_until_held(process: subprocess.Popen, run: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if held_file(run).exists():
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no step {HELD_AT}: {process.communicate()[0]}")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.mark.fault(3, "USR1 to a run of one process, TERM twice to one of two")
@pytest.mark.parametrize(
    "num_processes, signals",
    [(1, [signal.SIGUSR1]), pytest.param(2, [signal.SIGTERM, signal.SIGTERM], marks=pytest.mark.slow)],
)
def test_a_stopped_run_saves_ends_with_75_and_goes_on_undisturbed(start, run_warm, undisturbed, num_processes, signals):
    name = f"stopped-{num_processes}"
    process, run = start(name, num_processes)
    wait_until_held(process, run)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    told, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, told
    outcome = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    stopped_at = outcome["step"]
    assert outcome["code"] == 75 and signals[0].name in outcome["reason"] and HELD_AT <= stopped_at < STEPS
    assert (run / "checkpoints" / f"step-{stopped_at:08d}" / "COMPLETE").is_file()
    assert len(losses(run)) == stopped_at

    run_warm(name, num_processes)
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(undisturbed(num_processes))


@pytest.mark.fault(2, "kill -9 of `accelerate launch` in mid-run")
@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_leave(start):
    process, run = start("orphans", 2)
    wait_until_held(process, run)
    (launcher,) = list_children_of(process.pid)
    ranks = list_children_of(launcher)
    assert len(ranks) >= 2
    os.kill(launcher, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while any(is_alive(pid) for pid in ranks):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.1)
    assert json.loads((run / "outcome.json").read_text(encoding="utf-8"))["code"] == 75
    assert list((run / "checkpoints").glob("step-*/COMPLETE"))


@pytest.mark.fault(25, "a start between a kill and the end of the ranks that still save")
@pytest.mark.slow
def test_a_start_right_after_kill_9_waits_for_the_ranks_that_still_save(start, undisturbed):
    """Of the supervisor and its launcher at once; the ranks are told by nobody but the kernel."""
    process, run = start("killed", 2)
    wait_until_held(process, run)
    (launcher,) = list_children_of(process.pid)
    ranks = list_children_of(launcher)
    process.kill()
    os.kill(launcher, signal.SIGKILL)
    go_file(run).touch()
    again, _ = start("killed", 2)
    told, _ = again.communicate(timeout=PATIENCE)
    process.communicate()
    assert again.returncode == 0, told
    assert not any(is_alive(pid) for pid in ranks)
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(undisturbed(2))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it ended before it was opened, or before it was read
        return False


@pytest.mark.fault(3, "USR2 and TERM while a rank still imports")
def test_a_signal_during_the_imports_only_sets_a_flag(tmp_path):
    script = (
        "from trainer.process.stop_signals import install_stop_signals, stop_signal; import os, signal\n"
        "install_stop_signals(); assert stop_signal() is None\n"
        "os.kill(os.getpid(), signal.SIGUSR2); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(stop_signal())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "SIGUSR2"


@pytest.mark.fault(6, "a sample that one rank alone reads, in a real launch that takes no damage")
@pytest.mark.fault(30, "an error in the thread that reads for one of two ranks, in a real launch")
@pytest.mark.slow
def test_a_rank_that_fails_alone_is_heard(start, config, samples, tmp_path):
    """Its message and its code reach whoever started the run, not what the others say when it is gone."""
    from data.batches.order import Order
    from trainer.training_data import choose_order

    cache = tmp_path / "cache"
    shutil.copytree(config.data.cache, cache)
    settings = replace(choose_order(config, samples), global_batch_size=4)
    table = samples.table
    order = Order(table.dataset, table.bucket, np.where(table.split == "train", table.samples, 0), settings)
    shard, row = int(order.batch(0).shards[3]), int(order.batch(0).rows[3])  # the last of the batch: rank 1's
    damage(Cache(cache, samples.manifest, table), row, shard=shard)
    process, run = start("heard", 2, f"data.cache={cache}", "guard.max_bad_samples=0")
    told, _ = process.communicate(timeout=PATIENCE)
    outcome = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    assert (process.returncode, outcome["code"]) == (2, 2), told
    assert outcome["reason"].startswith("rank 1: ") and "does not match its checksum" in outcome["reason"]


@pytest.mark.fault(4, "TERM during a save that lasts longer than the launcher waits, whose kill -9 ends it")
@pytest.mark.slow
def test_a_save_that_the_launcher_cuts_off_leaves_the_checkpoint_before(config, tmp_path):
    ended = launch(config, tmp_path, "graceless", "single", 1, _STALLS, shutdown_seconds=2)
    told = "stopped by SIGTERM before the trainer could say where; it goes on from step 2, its newest checkpoint"
    assert (ended.code, ended.reason) == (75, told)
    checkpoints = tmp_path / "graceless" / "checkpoints"
    assert [marker.parent.name for marker in checkpoints.glob("*/COMPLETE")] == ["step-00000002"]
    assert len(list(checkpoints.iterdir())) == 2, "the half that was written"
    assert launch(config, tmp_path, "graceless", "single", 1, "") == Outcome(0, "done", 4)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    assert len(losses(tmp_path / "graceless")) == 4
