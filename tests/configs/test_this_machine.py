import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import this_machine
from configs.this_machine import available_memory_bytes, count_cores, memory_bytes

ROOT = Path(__file__).resolve().parents[2]

COUNT = """
import os
from configs.this_machine import count_cores
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(count_cores())
"""


def test_a_process_confined_to_one_core_counts_one():
    assert subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("told, count", [(6, 6), (None, 1)])
def test_a_system_without_affinity_counts_the_machines(monkeypatch, told, count):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: told)
    assert count_cores() == count


def test_memory_is_that_of_the_kernel_where_a_system_tells(monkeypatch):
    with open("/proc/meminfo", encoding="ascii") as file:
        kib = int(file.readline().split()[1])
    assert memory_bytes() == kib * 1024
    monkeypatch.delattr(os, "sysconf")
    assert memory_bytes() is None


def test_what_can_still_be_taken_is_the_kernels_word_or_less_by_a_control_group(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  4000 kB\nMemFree:  100 kB\nMemAvailable:  3000 kB\n")
    monkeypatch.setattr(this_machine, "_MEMINFO", tmp_path / "meminfo")
    for room, left in (([], 3000 * 1024), ([5e6], 3000 * 1024), ([2e6, 1e6], 1e6)):
        monkeypatch.setattr(this_machine, "room_below_limits", lambda room=room: room)
        assert available_memory_bytes() == left
    monkeypatch.setattr(this_machine, "_MEMINFO", tmp_path / "none")
    assert available_memory_bytes() is None
