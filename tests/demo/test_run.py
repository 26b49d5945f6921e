"""`make demo` as a user runs it, to its end: the proof that the whole path is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.run import make_inputs

ROOT = Path(__file__).resolve().parents[2]


def test_the_demos_inputs_are_made_without_a_word_of_the_libraries_whatever_an_earlier_demo_left(tmp_path, capfd):
    for left in ("triples", "model"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "of-another-release").touch()
    make_inputs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"triples", "model"}
    assert not list(tmp_path.rglob("of-another-release")) and (tmp_path / "model" / "model_index.json").is_file()
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_learns_its_training_crops_up_to_the_vaes_ceiling():
    # Beside other tests one thread: of so small a model a second one that waits takes a core, and saves no time.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, "demo/run.py"]
    demo = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert demo.returncode == 0, demo.stderr[-3000:]
    assert ".venv/bin/fluxfill train my.yaml" in demo.stdout  # what to type next
    run = ROOT / "runs" / "demo"
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    assert (first["step"], last["step"]) == (0, 900)
    trained = last["train"]
    assert trained["items"] >= 48
    assert trained["hole_psnr"] > trained["hole_psnr_ceiling"] - 0.5
    assert trained["hole_psnr"] > first["train"]["hole_psnr"] + 11
    assert last["holdout"]["items"] >= 48
    assert (run / "samples" / "step-00000900-train.png").is_file()
    assert (run / "final" / "model_index.json").is_file()
