import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.slurm.cluster import Cluster, reason_to_skip, wait_for

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]


def test_two_nodes_run_a_step_together_with_the_gpus_asked_for(cluster: Cluster) -> None:
    line = cluster.run(
        "srun", "--nodes=2", "--gpus-per-node=2", "bash", "-c", "echo $SLURMD_NODENAME $SLURM_GPUS_ON_NODE"
    )
    assert sorted(line.splitlines()) == [f"{node} 2" for node in cluster.nodes]


def test_a_batch_job_ends_in_the_state_that_it_ended_in(cluster: Cluster, tmp_path: Path) -> None:
    done, failed = (cluster.submit(f"#!/bin/sh\nexit {code}\n", folder=tmp_path) for code in (0, 3))
    assert cluster.wait(done) == "COMPLETED"
    assert cluster.wait(failed) == "FAILED" and cluster.show(failed)["ExitCode"] == "3:0"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """pytest's own folders have names too long for a step's socket, and TMPDIR may have one."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))
def test_a_killed_owner_leaves_no_process_behind(short_folder: Path) -> None:
    """Neither a daemon nor a job of its."""
    code = (
        "import pathlib, sys, time\n"
        "from tests.slurm.cluster import running_cluster\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with running_cluster(folder) as cluster:\n"
        "    script = f'#!/bin/sh\\ntouch ready; exec -a a-job-of-{folder.name} sleep 600'\n"
        "    cluster.submit(script, folder=folder)\n"
        "    time.sleep(600)\n"
    ).replace("#!/bin/sh", "#!/bin/bash")
    job = f"a-job-of-{short_folder.name}"
    owner = subprocess.Popen([sys.executable, "-c", code, str(short_folder)], cwd=ROOT)
    try:
        wait_for(lambda: "ready" if (short_folder / "ready").exists() else None, "the job did not start")
        assert processes_that_name(str(short_folder)) and processes_that_name(job)
    finally:
        owner.kill()
        owner.wait()
    deadline = time.monotonic() + PATIENCE
    while left := processes_that_name(str(short_folder)) + processes_that_name(job):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def processes_that_name(text: str) -> list[str]:
    """Command lines on this machine that hold a text."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return [line for line in lines if text in line]
