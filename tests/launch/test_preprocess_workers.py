"""The ways in which a user starts several workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.loading import dump_config
from tests.data.made_caches import stored_shards
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
FLUXFILL = "from launch.cli import main; main()"


def run(command, **environ):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environ
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def config_file(demo_config, tmp_path):
    """A config, written; `config_file(cache_name)`."""

    def write(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(demo_config(tmp_path / name, "data.encode_batch_size=4")), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("start", [["-m", "data.preprocess", "--config"], ["-c", FLUXFILL, "preprocess"]])
def test_libraries_are_quieted_before_the_first_of_them_is_imported(tmp_path, start):
    """Most of what they say they say then. Here torch is a file that tells what it found."""
    (tmp_path / "torch.py").write_text("import os, sys\nsys.exit(40 + (os.environ.get('TQDM_DISABLE') == '1'))")
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(
        [sys.executable, *start, "configs/demo.yaml"],
        env=environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 41, done.stderr.decode()[-2000:]


@pytest.mark.slow
def test_ranks_of_accelerate_and_tasks_of_an_array_make_the_same_cache(config_file, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/engines/ddp.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "data/preprocess.py", "--config"]
    printed = run([*launch, str(config_file("ranks"))])
    assert "worker 1 of 2 (rank 0)" in printed and "worker 2 of 2 (rank 1)" in printed
    assert printed.count("samples ┃") == 1, "one table for all that share a terminal"

    fluxfill = [sys.executable, "-c", FLUXFILL, "preprocess"]
    task = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    for number in (2, 1):
        printed = run([*fluxfill, str(config_file("array"))], SLURM_ARRAY_TASK_ID=str(number), **task)
        assert f"worker {number} of 2 (SLURM array task {number})" in printed
    assert "0 of 96 samples were encoded now, by worker 1 of 2 (SLURM array task 1)." in printed, (
        "the second task found all of it done"
    )
    assert stored_shards(tmp_path / "array") == stored_shards(tmp_path / "ranks")
    assert len(stored_shards(tmp_path / "array")) > 2
