import io
import random
import signal
import sys
import tarfile
import textwrap
from collections import Counter

import pytest

from demo.soak_faults import FAULTS, KILLS, Fault, Moment, Start, draw_fault, inflict
from tests.patience import PATIENCE

# A launch in small: prints as a run does, trains two steps, and leaves a process behind that hears no signal.
LAUNCH = """
import json, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
print(f"resumed from {folder}, step 5 (saved by ddp)", flush=True)
left = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", left, "trainer/main.py"])
with (folder / "metrics.jsonl").open("a") as file:
    for step in (6, 7):
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\\n")
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def launch(tmp_path):
    def start(seconds: float, kind: str = "signal") -> Start:
        line = [sys.executable, "-c", textwrap.dedent(LAUNCH), str(tmp_path), str(seconds)]
        fault = Fault(kind, Moment(steps=2), 0.5)
        return Start(line, tmp_path / "output" / "a.txt", tmp_path, fault, longest_seconds=PATIENCE)

    return start


def test_what_a_launch_leaves_behind_is_named_and_ended(launch):
    start = launch(0.0)
    assert start.wait() == 0
    (rank,) = start.processes("rank")
    assert start.processes() == [rank] and start.processes("launcher") == []
    (told,) = start.left_behind(0.5)
    assert told.strip().endswith("trainer/main.py")
    assert start.left_behind(60) == []


def test_a_moment_is_waited_for_until_the_end(launch):
    start = launch(600.0)
    assert start.reached(Moment(steps=2)) and start.reached(Moment(seconds=0.1))
    assert (start.first_step(), start.steps()) == (6, 7)
    inflict(Fault("kill -9 all", Moment(steps=2), 0.5), start, start.process)
    assert start.wait() == -signal.SIGKILL and start.left_behind(60) == []
    assert not start.reached(Moment(steps=3))


def test_a_shard_is_cut_and_put_back(tmp_path, launch):
    shards = tmp_path / "cache" / "shards" / "a"
    shards.mkdir(parents=True)
    for name in ("48x64-000001.tar", "holdout-48x64-000001.tar"):
        (shards / name).write_bytes(bytes(range(200)))
    start = launch(0.0)
    start.wait()
    undo = inflict(Fault("truncated shard", Moment(steps=2), 0.5), start, tmp_path / "cache")
    assert [path.stat().st_size for path in sorted(shards.iterdir())] == [100, 200]
    undo()
    assert {path.read_bytes() for path in shards.iterdir()} == {bytes(range(200))}
    start.left_behind(0)


def test_a_bit_of_what_is_trained_on_flips_and_is_put_back(tmp_path, launch):
    path = tmp_path / "cache" / "shards" / "a" / "48x64-000001.tar"
    path.parent.mkdir(parents=True)
    tensors = ("a.safetensors", "b.safetensors")
    with tarfile.open(path, "w") as tar:
        for name, size in (("a.json", 100), ("a.text.safetensors", 16), *((name, 100) for name in tensors)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    whole = path.read_bytes()
    start = launch(600.0)
    start.reached(Moment(steps=2))
    undo = inflict(Fault("flipped bit", Moment(steps=2), 0.001), start, tmp_path / "cache")  # the second of them
    assert start.wait() == -signal.SIGTERM  # told to stop, as with a run that goes on
    with tarfile.open(path) as tar:
        read = [tar.extractfile(name).read() for name in ("a.json", *tensors)]
    assert [data.count(1) for data in read] == [0, 0, 1] and all(len(data) == 100 for data in read)
    undo()
    assert path.read_bytes() == whole
    start.left_behind(0)


def test_what_is_drawn_is_the_seeds(tmp_path):
    draws = [[draw_fault(random.Random(seed), list(FAULTS), 10.0, 5) for _ in range(3)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    chance = random.Random(3)
    kills = [draw_fault(chance, list(KILLS), 10.0, 5) for _ in range(1000)]
    assert set(Counter(fault.kind for fault in kills)) == set(KILLS)
    early = [fault.moment.seconds for fault in kills if fault.moment.seconds is not None]
    assert 400 < len(early) < 600 and min(early) >= 0 and max(early) <= 10
    assert {fault.moment.steps for fault in kills} == set(range(1, 8))
    few = [draw_fault(chance, list(KILLS), 10.0, 5, most_steps=2) for _ in range(100)]
    assert {fault.moment.steps for fault in few} == {1, 2}
