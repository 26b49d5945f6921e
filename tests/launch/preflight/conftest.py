"""Nodes of a run as processes of this machine, each with its own folder, environment and clock."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.ranks import own_port
from launch.preflight.place import Place
from tests.patience import PATIENCE

# Of what is slow here, the start of a process and the import of torch, no deadline is to tell: the head's for arrivals
# begins when its own node has come, and that of the ranks, and for them to meet, when those of all nodes have imported.
# With report=0 no node hands its report in before it is too late.
_NODE = """
import json, sys, threading, time
from pathlib import Path
import launch.preflight.run as run
from launch.preflight.exchange import Head
from launch.preflight.place import Place
from launch.preflight.ranks import Ranks
from launch.preflight.run import Patience, run_preflight
from tests.patience import PATIENCE

config, place, ahead, result, patience = json.loads(sys.argv[1])
wait, answer, run_ranks, look, late = Head.wait, Head.answer, Ranks.run, run.look_at_node, threading.Event()
def wait_from_own_arrival(head, kind, count, deadline):
    if kind == "hello":
        begun = time.monotonic()
        wait(head, kind, 1, begun + PATIENCE)
        deadline += time.monotonic() - begun
    return wait(head, kind, count, deadline)
def answer_and_tell(head, kind, value):
    late.set()
    answer(head, kind, value)
def run_when_imported(ranks, go, deadline):
    limit = time.monotonic() + PATIENCE
    while any(found["stage"] == "importing" for found in ranks._found) and time.monotonic() < limit:
        time.sleep(0.05)
    Path(f"{result}.imported{place['rank']}").touch()
    while len([*Path(result).parent.glob("*.imported*")]) < place["count"] and time.monotonic() < limit:
        time.sleep(0.05)
    return run_ranks(ranks, go, time.monotonic() + patience["ranks"])
def look_late(*given):
    if patience.get("report") == 0:
        late.wait(PATIENCE)
    return look(*given)
Head.wait, Head.answer = wait_from_own_arrival, answer_and_tell
Ranks.run, run.look_at_node = run_when_imported, look_late
patience = {**dict.fromkeys(("arrival", "report", "meeting", "ranks", "hearing"), PATIENCE), **patience}
def tell(finding):
    print(finding.check.state, ",".join(finding.nodes) or "all", finding.check.name, finding.check.what, sep="|")
def clock():
    return time.time() + ahead
sys.exit(run_preflight(config, [], Place(**place), Path(result), tell, Patience(**patience), clock))
"""


@dataclass(frozen=True)
class Node:
    """folder: where it stands, so that relative paths are its own.  ahead: seconds of its clock."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ahead: float = 0.0


@dataclass(frozen=True)
class Told:
    """What a preflight came to.  lines: "state|nodes|subject|what" of each finding."""

    code: int
    lines: list[str]
    output: str

    def about(self, subject: str) -> list[str]:
        return [line for line in self.lines if line.split("|")[2] == subject]


@pytest.fixture
def run_nodes(tmp_path: Path) -> Callable[..., Told]:
    """run_nodes(config, nodes, count=None, **patience): a preflight of `count` nodes, of which only `nodes` come."""

    def run(config: Path, nodes: list[Node], count: int | None = None, **patience: float) -> Told:
        with own_port() as port:
            return run_at(port, config, nodes, count, patience)

    def run_at(port: int, config: Path, nodes: list[Node], count: int | None, patience: dict[str, float]) -> Told:
        started = []
        for rank, node in enumerate(nodes):
            place = vars(Place(rank, count or len(nodes), 1, "127.0.0.1", port, (), token="of this job"))
            words = json.dumps([str(config), place, node.ahead, str(tmp_path / "preflight.json"), patience])
            path = os.pathsep.join(filter(None, [node.environment.get("PYTHONPATH"), *sys.path]))
            environment = {**os.environ, "SLURMD_NODENAME": f"n{rank}", **node.environment, "PYTHONPATH": path}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", _NODE, words],
                    cwd=node.folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        lines = [line for line in outputs[0].splitlines() if line.count("|") >= 3]
        return Told(started[0].returncode, lines, "\n".join(outputs))

    return run
