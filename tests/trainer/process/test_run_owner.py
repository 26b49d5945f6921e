"""Two starts of one run, by real launches."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import AlreadyRunning
from data.storage.run_lock import own_run_folder
from tests.patience import PATIENCE
from trainer.process import run_owner
from trainer.process.outcome import run_and_report

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "demo.yaml")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "FLUXFILL_OUTCOME", "FLUXFILL_OWNER", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.fault(23, "plain accelerate launch beside a run")
@pytest.mark.parametrize("engine, processes", [("single", 1), ("ddp", 2)])
def test_plain_accelerate_launch_leaves_a_running_runs_folder_as_it_is(tmp_path, engine, processes):
    """Rank 0 says whose it is, before torch is imported; the others leave with it."""
    run = tmp_path / "demo"
    line = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    line += ["--config_file", f"configs/engines/{engine}.yaml", "--main_process_port", "0"]
    with own_run_folder(run, {}, supervisor="fluxfill train"):
        (run / "outcome.json").write_text("the first one's")
        before = files(run)
        ended = subprocess.run(
            [*line, "trainer/main.py", "--config", CONFIG, f"run.dir={tmp_path}", "run.name=demo"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        after = {name: told for name, told in files(run).items() if not name.startswith("owner-")}
        assert after == {name: told for name, told in before.items() if not name.startswith("owner-")}
        assert len(files(run)) == 2
    assert ended.returncode == 1
    told = [text for text in ended.stderr.splitlines() if "belongs to another start of this run" in text]
    assert told and f"(fluxfill train, process {os.getpid()} on " in told[0]


def test_the_trainer_itself_ends_with_3(tmp_path):
    with own_run_folder(tmp_path / "demo", {}, supervisor="fluxfill train"):
        line = [sys.executable, "trainer/main.py", "--config", CONFIG, f"run.dir={tmp_path}", "run.name=demo"]
        ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 3 and "belongs to another start" in ended.stderr


def test_a_stop_signal_is_heard_while_an_owner_that_may_be_gone_is_watched(tmp_path):
    """And no outcome is left in the folder, which is not this start's yet."""
    with own_run_folder(tmp_path / "demo", {}, supervisor="fluxfill train"):
        file = tmp_path / "demo" / "owner-1.json"
        told = json.loads(file.read_text())
        told["processes"][0]["place"] = "another kernel"
        file.write_text(json.dumps(told))
        line = [sys.executable, "trainer/main.py", "--config", CONFIG, f"run.dir={tmp_path}", "run.name=demo"]
        process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert any("waiting for fluxfill train" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 75
        names = sorted(path.name for path in (tmp_path / "demo").iterdir())
        assert [name for name in names if not name.endswith(".part")] == ["owner-1.json"]  # as it was when it was ended


def test_a_folder_is_given_back_when_the_work_has_an_end(arguments, tmp_path):
    def owner():
        (file,) = (tmp_path / "test").glob("owner-*.json")
        return json.loads(file.read_text())

    assert run_and_report(lambda: None) == 0  # a check
    assert not owner()["ended"]
    seen = []
    assert run_and_report(lambda: seen.append(owner()) or 7) == 0
    assert not seen[0]["ended"] and owner()["ended"]


def test_one_that_has_lost_its_folder_leaves_no_outcome_there(arguments, tmp_path, capsys):
    def work():
        first = tmp_path / "test" / "owner-1.json"
        (tmp_path / "test" / "owner-2.json").write_text(first.read_text())
        (tmp_path / "test" / "outcome.json").write_text("the new one's")
        run_owner.confirm_ownership()

    assert run_and_report(work) == 3
    assert (tmp_path / "test" / "outcome.json").read_text() == "the new one's"
    assert "was taken for dead" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_disk_that_does_not_list_the_folder_does_not_take_the_place_of_what_went_wrong(
    arguments, tmp_path, monkeypatch, rank
):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    def work():
        monkeypatch.setattr("os.listdir", refuse)
        raise RuntimeError("the reason")

    monkeypatch.setenv("RANK", rank)
    (tmp_path / "test").mkdir()
    with pytest.raises(RuntimeError, match="the reason"):
        run_and_report(work)
    assert "the reason" in json.loads((tmp_path / "test" / "outcome.json").read_text())["reason"]


def test_what_fails_after_the_loss_writes_nothing_either(arguments, tmp_path):
    def work():
        (tmp_path / "test" / "owner-2.json").write_text((tmp_path / "test" / "owner-1.json").read_text())
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        run_and_report(work)
    assert not (tmp_path / "test" / "outcome.json").exists()


def test_ranks_of_a_start_that_lost_its_folder_leave_no_outcome_either(arguments, tmp_path, monkeypatch):
    """They own nothing, but know where their rank 0 is met."""
    monkeypatch.setenv("MASTER_ADDR", "n01")
    with own_run_folder(tmp_path / "test", {"MASTER_ADDR": "n01", "MASTER_PORT": "2"}, supervisor="rank 0's"):
        for port, written in (("1", False), ("2", True)):
            monkeypatch.setenv("MASTER_PORT", port)
            monkeypatch.setenv("RANK", "1")

            def work():
                raise RuntimeError("Connection closed by peer")

            with pytest.raises(RuntimeError):
                run_and_report(work)
            assert (tmp_path / "test" / "outcome.json").exists() == written


def test_a_process_that_wakes_up_after_it_was_replaced_stops_at_once(tmp_path):
    """Stopped for minutes, taken for dead elsewhere: the heartbeat is the first to see it."""
    code = (
        "import sys, time, pathlib; import data.storage.run_lock as run_lock; from trainer.process import run_owner\n"
        "run_lock.HEARTBEAT_SECONDS = 0.2; run_owner.own(pathlib.Path(sys.argv[1])); print('owner', flush=True)\n"
        "while True: time.sleep(1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "owner\n" in process.stdout
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    file = tmp_path / "owner-1.json"
    told = json.loads(file.read_text())
    told["processes"][0]["place"] = "another kernel"
    file.write_text(json.dumps(told))
    os.utime(file, (time.time() - 1000,) * 2)
    with own_run_folder(tmp_path, {}, supervisor="the next start"):
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 3
        assert "taken for dead; the folder belongs to the next start, process" in error
        with pytest.raises(AlreadyRunning), own_run_folder(tmp_path, {}, supervisor="a third"):
            pass
