import json
import subprocess
import sys

from benchmarks.ranks import own_port
from launch.preflight.all_reduce import STAGES
from tests.patience import PATIENCE


def start(rank: int, go: dict | None) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.preflight.all_reduce", str(rank), "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write("" if go is None else json.dumps(go) + "\n")
    process.stdin.close()
    return process


def said(process: "subprocess.Popen[str]") -> list[dict]:
    assert process.stdout is not None
    lines = [json.loads(line) for line in process.stdout]
    process.wait(PATIENCE)
    return lines


def test_ranks_on_two_nodes_pass_data_on_and_reduce_it() -> None:
    with own_port() as port:
        go = {"world": 2, "processes": 1, "head": "127.0.0.1", "port": port, "seconds": 200}
        of_ranks = [said(process) for process in [start(rank, go) for rank in (0, 1)]]
    for lines in of_ranks:
        assert tuple(line["stage"] for line in lines) == STAGES[1:]
        assert lines[-1]["ring_seconds"] > 0 and lines[-1]["all_reduce_seconds"] > 0


def test_a_rank_that_nobody_needs_ends_and_one_that_fails_says_how() -> None:
    needless = start(0, None)
    lonely = start(1, {"world": 2, "processes": 1, "head": "127.0.0.1", "port": 1, "seconds": 1})
    assert [line["stage"] for line in said(needless)] == ["imported"] and needless.returncode == 0
    imported, failed = said(lonely)
    assert (imported["stage"], failed["stage"]) == ("imported", "failed") and lonely.returncode == 1
    assert failed["error"] and failed["failed_after"] > 0
