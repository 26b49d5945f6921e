"""The driver's answer, from a script in its place."""

from pathlib import Path

import pytest

from launch.gpus import Gpu, list_gpus

ANSWER = """\
0, NVIDIA H200, 143771, 512, 580.65.06, 9.0, GPU-aaaa
1, NVIDIA H200, 143771, 71885, 580.65.06, 9.0, GPU-bbbb
2, NVIDIA GB10, [N/A], [N/A], 580.65.06, 12.1, GPU-cccc
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{ANSWER}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_name_memory_driver_and_capability_are_read(driver):
    first, second, shared = list_gpus({})
    assert first == Gpu(0, "NVIDIA H200", 143771 / 1024, 0.5, "580.65.06", (9, 0))
    assert second.used_gib == pytest.approx(70.2, abs=0.01)
    assert shared.memory_gib == 0.0 and shared.capability == (12, 1)


@pytest.mark.parametrize(
    "visible, indexes", [("1,0", [1, 0]), ("GPU-bb", [1]), ("", []), ("-1", []), ("0,7,1", [0]), ("2", [2])]
)
def test_those_that_the_user_allows_are_in_the_users_order(visible, indexes, driver):
    assert [gpu.index for gpu in list_gpus({"CUDA_VISIBLE_DEVICES": visible})] == indexes


def test_a_machine_without_a_driver_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus({}) == []
