import signal
import time
from pathlib import Path

from benchmarks.ranks import own_port
from launch.preflight.ranks import Ranks
from tests.patience import PATIENCE


def go(world: int, port: int) -> dict:
    return {"world": world, "processes": world, "head": "127.0.0.1", "port": port, "seconds": 200}


def test_the_ranks_of_a_node_meet() -> None:
    ranks = Ranks(0, 2)
    with own_port() as port:
        found = ranks.run(go(2, port), time.monotonic() + PATIENCE)
    assert [(rank["rank"], rank["stage"]) for rank in found] == [(0, "done"), (1, "done")], found
    assert all(rank["gigabytes_per_second"] > 0 and rank["network"].startswith("gloo over") for rank in found)


def test_a_rank_that_hangs_is_ended_at_the_deadline_and_its_last_stage_known(tmp_path: Path) -> None:
    """Stopped as it starts, by itself."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n")
    ranks = Ranks(3, 1, {"PYTHONPATH": str(tmp_path)})
    [process] = ranks._processes
    [found] = ranks.run(go(1, 1), time.monotonic() + 0.5)
    assert found == {"rank": 3, "stage": "importing"}
    assert process.poll() == -signal.SIGKILL
