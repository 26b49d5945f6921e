"""Ranks whose launcher is killed while they start: none of them may stay."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.ranks import own_port
from configs.supervision import SUPERVISOR, list_children_of
from tests.orphans import adopt_no_orphans
from tests.patience import PATIENCE
from trainer.process import launcher
from trainer.process.launcher import PatienceWithOrphan

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "demo.yaml")

# A launcher of one rank of two: it waits for the other one in init_process_group.
_LAUNCHER = """
import os, subprocess, sys
environment = {**os.environ, "RANK": sys.argv[1], "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2], "TORCHELASTIC_RUN_ID": "test"}
child = subprocess.Popen([sys.executable, *sys.argv[3:]], env=environment)
print(child.pid, flush=True)
child.wait()
"""


def ranks_of(folder: Path) -> list[int]:
    """Processes of main.py that train below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        is_rank = any(word.endswith(b"main.py") for word in words) and b"accelerate.commands.launch" not in words
        if is_rank and f"run.dir={folder}".encode() in words and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while ranks := ranks_of(folder):
        assert time.monotonic() < deadline, f"{ranks} outlived their launcher"
        time.sleep(0.2)


@pytest.fixture
def sweep(tmp_path):
    """Ends what a failed test leaves. Orphans are adopted as on a machine of a user's: not by this process, which a
    supervisor of an earlier test may have asked for them."""
    adopt_no_orphans()
    yield
    for pid in ranks_of(tmp_path):
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_the_others_ends_with_its_launcher(tmp_path, sweep, rank):
    main = [str(ROOT / "trainer" / "main.py"), "--config", CONFIG, f"run.dir={tmp_path}"]
    with own_port() as port:
        line = [sys.executable, "-c", _LAUNCHER, str(rank), str(port)]
        started = subprocess.Popen([*line, *main], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        pid = int(started.stdout.readline())
        deadline = time.monotonic() + PATIENCE
        # Past the handlers, on its way to the others.
        while "libtorch_cpu" not in Path(f"/proc/{pid}/maps").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert pid in ranks_of(tmp_path)
        started.kill()
        started.wait()
        wait_until_gone(tmp_path)


@pytest.mark.fault(2, "kill -9 at any moment of a start, of accelerate launch and of fluxfill train")
@pytest.mark.parametrize("seed", range(5))
def test_kill_9_of_a_launcher_at_any_moment_of_the_start_leaves_no_rank(tmp_path, sweep, seed):
    """Plain accelerate launch; or fluxfill train, of which the supervisor or the launcher below it is killed."""
    chance = random.Random(seed)
    what = ("accelerate", "supervisor", "launcher below")[seed % 3]
    if what == "accelerate":
        line = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--num_processes", "2"]
        line += ["--config_file", "configs/engines/ddp.yaml", "--main_process_port", "0"]
        line += ["trainer/main.py", "--config", CONFIG]
    else:
        line = [sys.executable, "-c", "from launch.cli import main; main()", "train", CONFIG]
        line += ["--num-processes", "2", "data.mode=online"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*line, f"run.dir={tmp_path}"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (ranks := ranks_of(tmp_path)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 6))
        if what == "launcher below":
            for child in list_children_of(process.pid):
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(child, signal.SIGKILL)
        else:
            process.kill()
        wait_until_gone(tmp_path)
        assert ranks
    finally:
        process.kill()
        process.wait()


@pytest.mark.fault(2, "a rank that starts when its launcher is dead")
def test_a_rank_that_starts_after_its_launcher_died_ends_itself(tmp_path, sweep):
    """Between its start and the moment in which it asks to be told, nobody tells it."""
    line = [sys.executable, "trainer/main.py", "--config", CONFIG, f"run.dir={tmp_path}"]
    rank = "import os, sys, time\nwhile os.getppid() == int(sys.argv[1]): time.sleep(0.02)\n"
    rank += f"os.execv(sys.executable, {line})"
    code = "import os, subprocess, sys\n"
    code += f"subprocess.Popen([sys.executable, '-c', {rank!r}, str(os.getpid())]); os._exit(0)"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test", "RANK": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    environment |= {SUPERVISOR: str(os.getpid())}  # which adopts it, if an earlier test has asked for that, or pid 1
    with (tmp_path / "said").open("w") as said:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stderr=said)
    deadline = time.monotonic() + PATIENCE
    while "and so it ends" not in (tmp_path / "said").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    wait_until_gone(tmp_path)


_RANK = """
import os
from trainer.process.launcher import end_with_launcher
end_with_launcher()
print("parent", os.getppid(), open("/proc/1/comm").read().strip(), flush=True)
"""


def test_a_launcher_that_is_pid_1_lives(tmp_path):
    """As `docker run IMAGE torchrun ...` makes it; torch's launcher gives itself another name."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a process is pid 1 only in a namespace of its own, which this user may not make")
    (tmp_path / "rank.py").write_text(_RANK)
    line = [*alone, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--master_port=0"]
    line.append(str(tmp_path / "rank.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(SUPERVISOR, None)
    ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (0, "parent 1 pt_elastic\n"), ended.stderr


@pytest.mark.parametrize(
    "environment, parent_is_supervisor, dead",
    [
        ({}, True, False),  # started by hand
        ({"TORCHELASTIC_RUN_ID": "none"}, False, False),
        ({"TORCHELASTIC_RUN_ID": "none"}, True, True),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, True, True),
    ],
)
def test_whose_child_a_rank_is_tells_whether_its_launcher_lives(environment, parent_is_supervisor, dead):
    supervisor = os.getppid() if parent_is_supervisor else os.getpid()  # process 1 may be the parent
    assert launcher._had_died(os.getppid(), environment | {SUPERVISOR: str(supervisor)}) is dead


def test_an_orphan_that_saves_has_as_long_as_its_launcher_would_have_waited(monkeypatch):
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "600")
    monkeypatch.setattr(launcher, "_parent", os.getppid())
    clock = [0.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: clock[0])
    patience = PatienceWithOrphan()
    clock[0] = 10000.0
    assert not patience.is_over()
    monkeypatch.setattr(launcher, "_parent", -1)
    assert not patience.is_over()
    clock[0] += 599
    assert not patience.is_over()
    clock[0] += 2
    assert patience.is_over()
