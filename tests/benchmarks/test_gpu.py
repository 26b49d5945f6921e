"""benchmarks/gpu.py, on a CPU: every case to its end, and what happens to those that fail."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import CASES, KINDS, OURS, SEED, Case, Failed, Measurement, Worker, read_lines, render_table
from configs.gpu_allocator import allocator_settings

ROOT = Path(gpu.__file__).resolve().parents[1]


def run_without_packages(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command under a Python that sees no installed package."""
    command = [sys.executable, "-S", ROOT / "benchmarks" / "gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def lines_of(case: str, **other: object) -> dict[str, object]:
    figures = {"seconds_per_step": 1.0, "samples_per_second": 1.0, "mfu": 0.5, "peak_gib": 30.0, "planned_gib": 29.0}
    about = {"benchmark": "gpu", "device": "H200", "commit": "a", "matmul_tflops": 700.0}
    return {"case": case, **about, **figures, **other}


@pytest.mark.slow
def test_every_case_runs_to_its_end_on_a_cpu_and_a_second_run_measures_none_again(tmp_path):
    broken = Case("broken", "a setting that there is not", "bf16", 512, settings=("train.no_such_key=1",))
    cases, out = (broken, *CASES), tmp_path / "gpu.jsonl"
    assert Measurement(tmp_path / "first", out, minutes=60, tiny=True).run(cases) == 0
    lines = read_lines(out)
    found = {line["case"]: line for line in lines if line["benchmark"] == "gpu"}
    assert list(found) == [case.name for case in cases]
    assert "no_such_key" in found.pop("broken")["error"]
    for line in found.values():
        assert line["seconds_per_step"] > 0 and line["samples_per_second"] > 0 and line["mfu"] > 0, line
        assert line["case"] == SEED or line["planned_gib"] > 0
        assert {"device", "commit", "steps", "first_loss"} <= line.keys()
    apart = {line["kind"]: line["furthest"] for line in lines if line["benchmark"] == "gpu_parity"}
    assert apart.keys() == KINDS.keys() and all(0 <= share < gpu.TOLERANCE for share in apart.values())
    assert found[OURS]["first_loss"] == pytest.approx(found["lora-1024"]["first_loss"], rel=1e-3)

    assert Measurement(tmp_path / "second", out, minutes=60, tiny=True).run(cases) == 0
    assert read_lines(out) == lines


def test_without_any_package_it_says_what_it_needs():
    made = run_without_packages("--tiny")
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert made.returncode == 2 and [line["case"] for line in lines] == [case.name for case in CASES]
    assert all("torch" in line["skipped"] for line in lines)


def test_the_table_of_no_results_names_every_case_and_says_that_none_was_measured(tmp_path):
    made = run_without_packages("--table", "--out", str(tmp_path / "none.jsonl"))
    rows = made.stdout.splitlines()[2:]
    assert made.returncode == 0 and len(rows) == len(CASES) <= 12
    assert all(case.about in row and "not measured yet" in row for case, row in zip(CASES, rows, strict=True))


def test_cases_of_a_missing_package_are_passed_over_with_its_name(monkeypatch, tmp_path):
    here = gpu.is_there
    monkeypatch.setattr(gpu, "is_there", lambda package: package not in ("diffusers", "pydantic") and here(package))
    out = tmp_path / "gpu.jsonl"
    assert Measurement(tmp_path, out, minutes=60, tiny=True).run(CASES) == 0
    skipped = {line["case"]: line["skipped"] for line in read_lines(out)}
    assert len(skipped) == len(CASES) and all("diffusers, pydantic" in reason for reason in skipped.values())


def test_with_no_time_left_nothing_is_begun(tmp_path):
    out = tmp_path / "gpu.jsonl"
    assert Measurement(tmp_path, out, minutes=0, tiny=True).run(CASES) == 0
    assert {line["skipped"] for line in read_lines(out)} == {gpu.NO_TIME}


def test_a_worker_that_dies_hangs_or_raises_is_told_of(tmp_path, capfd, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    others = set(multiprocessing.active_children())
    worker = Worker(tmp_path / "raises")
    worker.begin("gpu_card", "matmul_rate", side=-1)
    with pytest.raises(Failed, match=r"RuntimeError: .*negative"):
        worker.answer(300)
    assert "Traceback" in capfd.readouterr().err

    worker = Worker(tmp_path / "hangs")
    worker.begin("gpu_card", "describe")
    found = worker.answer(300)
    assert found["torch"] and found["allocator"] == allocator_settings({})["PYTORCH_ALLOC_CONF"]
    worker.begin("gpu_card", "matmul_rate", side=64, seconds=1e6)
    with pytest.raises(Failed, match="no end after 1 s") as hanging:
        worker.answer(1)
    assert hanging.value.timed_out and not set(multiprocessing.active_children()) - others

    worker = Worker(tmp_path / "dies")
    (process,) = set(multiprocessing.active_children()) - others
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(Failed, match="died, exit code -9") as dead:
        worker.answer(300)
    assert not dead.value.timed_out


def test_the_table_shows_the_newest_commit_of_each_device_and_compares_with_the_seed():
    lines = [
        lines_of(OURS, seconds_per_step=9.0, commit="old"),
        lines_of("lora-512", skipped=gpu.NO_TIME) | {"seconds_per_step": 0.0},
        lines_of(OURS, seconds_per_step=0.5),
        lines_of(SEED, seconds_per_step=2.0, peak_gib=75.0, planned_gib=None),
        {"benchmark": "gpu", "case": "lora-512", "device": "H200", "commit": "a", "skipped": "no", "matmul_tflops": 1},
        {"benchmark": "gpu_parity", "kind": "bf16", "device": "H200", "commit": "a", "furthest": 0.01},
        {"benchmark": "gpu", "case": OURS, "device": "L40S", "commit": "b", "error": "out of memory"},
    ]
    table = render_table(lines)
    assert "H200, commit a" in table and "L40S" not in table
    assert "| 0.500 | 1.00 | 50.0% | 30.0 | 29.0 |" in table and "9.000" not in table
    assert "| 2.000 | 1.00 | 50.0% | 75.0 |  |" in table
    assert "not measured: no |" in table
    assert "4.0 times the seconds and 2.5 times the memory" in table


def test_a_line_counts_as_done_on_its_device_and_commit_alone(tmp_path):
    measurement = Measurement(tmp_path, None, minutes=1, tiny=True)
    measurement._about = {"device": "H200", "commit": "a"}
    assert measurement._is_result_here(lines_of(OURS))
    assert measurement._is_result_here({**lines_of(OURS), "error": "out of memory"})
    for other in ({"device": "L40S"}, {"commit": "b"}, {"skipped": gpu.NO_TIME}, {"benchmark": "gpu_parity"}):
        assert not measurement._is_result_here({**lines_of(OURS), **other})


def test_kinds_that_compute_the_same_are_compared_with_what_they_name():
    for kind in KINDS.values():
        assert kind.like is None or KINDS[kind.like].settings == kind.settings
        assert (kind.like is not None) == bool(kind.how)
    assert all(case.kind in KINDS and case.side in (512, 1024) for case in CASES)
