"""The line of a job's step (launch/slurm/step.py) on a real SLURM, where a site's defaults would have it otherwise."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from launch.slurm.allocation import Allocation
from launch.slurm.step import render_step
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

TASK = """\
import json, os, pathlib, re, signal, subprocess, sys, time
node = int(os.environ["SLURM_NODEID"])
told = {name: os.environ.get(name) for name in ("FROM_THE_SCRIPT", "HOME", "SLURM_GPUS_ON_NODE")}
step = "{SLURM_JOB_ID}.{SLURM_STEP_ID}".format(**os.environ)
shown = subprocess.check_output(["scontrol", "show", "step", "--oneliner", step], text=True)
told["cores"] = int(re.search(r" CPUs=([0-9]+)", shown)[1])
told["stdin"] = sys.stdin.read()
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
if node == 0:
    sys.exit(1)
time.sleep(6)  # it saves, when the other has ended long ago
told["got"] = got
pathlib.Path("task.json").write_text(json.dumps(told))
"""


def test_a_step_takes_nothing_over_from_the_sites_defaults(cluster: Cluster, tmp_path: Path) -> None:
    """A task that still saves is not ended when another has failed, and gets what it needs."""
    (tmp_path / "task.py").write_text(TASK)
    allocation = Allocation("1", num_nodes=2, gpus_per_node=3, cpus_per_node=4, nodelist="")
    line = shlex.join(render_step(allocation, None, sys.executable, str(tmp_path), ["task"]))
    site = "SLURM_KILL_BAD_EXIT=1 SLURM_WAIT=1 SLURM_EXPORT_ENV=NONE"
    script = f"#!/bin/sh\nexport FROM_THE_SCRIPT=1 PYTHONPATH={tmp_path} {site}\n"
    script += f"printf 'a\\nb\\n' | while read line; do echo $line >> lines; {line}; done\n"
    asked = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=3", "--cpus-per-task=4", "--export=HOME")
    job = cluster.submit(script, *asked, f"--output={tmp_path}/log", folder=tmp_path)
    cluster.wait(job)
    told = json.loads((tmp_path / "task.json").read_text())
    assert told.pop("HOME") and told == {
        "FROM_THE_SCRIPT": "1",
        "SLURM_GPUS_ON_NODE": "3",
        "cores": 2 * 4,
        "stdin": "",
        "got": [],
    }
    assert (tmp_path / "lines").read_text() == "a\nb\n", "srun has read the script's input"
