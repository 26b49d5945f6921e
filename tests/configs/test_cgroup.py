"""Control groups: files as the kernel writes them, and a real group where one can be made."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import cgroup
from configs.cgroup import count_oom_kills, highest_use, memory_limits, room_below_limits
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "_OWN", tmp_path / "own")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2_is_read_from_the_own_group_outwards(groups: Path) -> None:
    (groups / "own").write_text("0::/user/job\n")
    job = groups / "cgroup" / "user" / "job"
    write(job / "memory.max", "max\n")
    write(job.parent / "memory.max", "1000\n")
    write(job / "memory.peak", "900\n")
    write(job / "memory.events", "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 0\n")
    write(job.parent / "memory.events", "oom_kill 7\n")
    assert (memory_limits(), highest_use(), count_oom_kills()) == ([1000.0], 900.0, 2)


@pytest.mark.parametrize("version", [1, 2])
def test_room_below_a_limit_counts_cached_files_as_free(groups: Path, version: int) -> None:
    own, limit, usage, cached = {
        1: (
            "4:memory:/job",
            "memory/job/memory.limit_in_bytes",
            "memory/job/memory.usage_in_bytes",
            "total_inactive_file",
        ),
        2: ("0::/job", "job/memory.max", "job/memory.current", "inactive_file"),
    }[version]
    (groups / "own").write_text(f"{own}\n")
    write(groups / "cgroup" / limit, "1000\n")
    write(groups / "cgroup" / usage, "900\n")
    write((groups / "cgroup" / limit).parent / "memory.stat", f"anon 700\n{cached} 150\nactive_file 50\n")
    assert room_below_limits() == [250.0]
    write(groups / "cgroup" / limit, "max\n" if version == 2 else "9223372036854771712\n")
    assert room_below_limits() == ([] if version == 2 else [pytest.approx(2**63, rel=1e-6)])


def test_version_1_is_read_from_the_memory_controller(groups: Path) -> None:
    (groups / "own").write_text("5:devices:/job\n4:memory:/job\n0::/\n")
    job = groups / "cgroup" / "memory" / "job"
    write(job / "memory.limit_in_bytes", "2000\n")
    write(job / "memory.max_usage_in_bytes", "1999\n")
    write(job / "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert (memory_limits(), highest_use(), count_oom_kills()) == ([2000.0], 1999.0, 1)


def test_a_container_that_sees_only_its_own_files(groups: Path) -> None:
    (groups / "own").write_text("0::/../../pod/x\n")
    write(groups / "cgroup" / "memory.events", "oom_kill 4\n")
    assert count_oom_kills() == 4


def test_without_control_groups_nothing_is_known(groups: Path) -> None:
    assert (memory_limits(), highest_use(), count_oom_kills()) == ([], None, 0)


_LIMIT = 400 * 2**20
# A supervisor in a group of its own, of whose run one process takes more memory than there is; the run says then what
# ranks say.
_RUN = """
import json, os, pathlib, subprocess, sys
killed = subprocess.run([sys.executable, "-c", "held = bytearray(2**30)"]).returncode
told = {"code": 1, "reason": f"Connection closed by peer ({killed})", "step": None, "again": None}
pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).write_text(json.dumps(told))
sys.exit(1)
"""
_SUPERVISOR = """
import os, pathlib, sys
from launch.supervise import run_supervised
group, outcome_file, run = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
(group / "cgroup.procs").write_text(str(os.getpid()))
outcome = run_supervised([sys.executable, "-c", run], {"FLUXFILL_OUTCOME": str(outcome_file)}, outcome_file)
print(outcome.code, outcome.reason)
"""


def _swaps() -> bool:
    swaps = Path("/proc/swaps")  # of a kernel that can
    return swaps.exists() and len(swaps.read_text().splitlines()) > 1


def _remove(group: Path) -> None:
    """Of a group whose last process may be ending just now."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A real group in which no more than _LIMIT is held, and nothing of it swapped out."""
    own = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), "0::/")
    version_1 = ":memory:" in own
    base = Path("/sys/fs/cgroup") / ("memory" if version_1 else "") / own.split(":", 2)[2].lstrip("/")
    group = base / f"fluxfill-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        try:
            (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(_LIMIT))
        except OSError:
            pytest.skip("no control group of memory can be made here")
        try:
            if version_1:
                (group / "memory.memsw.limit_in_bytes").write_text(str(_LIMIT))
            else:
                (group / "memory.swap.max").write_text("0")
        except OSError:
            if _swaps():
                pytest.skip("this machine swaps, and a control group cannot be kept from it")
        yield group
    finally:
        _remove(group)


def test_a_process_that_the_kernel_killed_for_memory_is_told_as_that(small_group: Path, tmp_path: Path) -> None:
    outcome_file = tmp_path / "outcome.json"
    tells_peak = any((small_group / name).exists() for name in ("memory.peak", "memory.max_usage_in_bytes"))
    ended = subprocess.run(
        [sys.executable, "-c", _SUPERVISOR, str(small_group), str(outcome_file), _RUN],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.stdout.startswith("1 the kernel killed 1 process(es) of this job, as the host's memory was full"), (
        ended
    )
    assert ("GiB were held at most, of 0.4. What helps:" in ended.stdout) == tells_peak  # Linux 5.19 tells it first
    assert ended.stdout.endswith("What was said then: Connection closed by peer (-9)\n")
    assert json.loads(outcome_file.read_text())["reason"] in ended.stdout
