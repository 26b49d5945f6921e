"""A job's end beside stand-ins for srun and scontrol."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import job
from tests.launch.slurm.stand_ins import RUNNING

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "configs" / "fill_lora.yaml"


@pytest.fixture
def run_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of a job: `run_job(srun=shell text, told=what scontrol says of the job)`. The run is `tmp_path`/r,
    and `tmp_path`/requeued holds what scontrol was asked to start again.

    ignored: a process of its own runs the job, as in a batch script, with this signal ignored; 0: with none."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"JOB_ID": "12", "JOB_NUM_NODES": "1", "JOB_NODELIST": "n0", "GPUS_ON_NODE": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "r").mkdir()

    def run(
        *overrides: str,
        work: str = "train",
        srun: str = "exit 0",
        told: str = RUNNING,
        preflight: dict | None = None,
        ignored: int | None = None,
    ) -> int:
        scontrol = f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/requeued && exit 0\n'
        scontrol += f'[ "$1" = update ] && echo "$2 $3" >> {tmp_path}/updated && exit 0\necho "{told}"'
        overrides = (f"slurm.preflight={str(preflight is not None).lower()}", *overrides)
        if preflight is not None:
            (tmp_path / "result").write_text(json.dumps({"result": preflight}))
            found = f"ls {tmp_path}/r > {tmp_path}/seen; mkdir -p {tmp_path}/r/slurm; "
            found += f"cp {tmp_path}/result {tmp_path}/r/slurm/preflight.json; exit 0"
            srun = f'case "$*" in *" preflight "*) {found};; esac; touch {tmp_path}/trained; {srun}'
        for name, text in (("srun", srun), ("scontrol", scontrol)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        given = [work, str(RECIPE), f"run.dir={tmp_path}", "run.name=r", *overrides]
        if ignored is None:
            return job.main(given)
        line = shlex.join([sys.executable, "-P", "-m", "launch.slurm.job", *given])
        return subprocess.run(["bash", "-c", f"trap '' {ignored}; exec {line}"], cwd=ROOT, check=False).returncode

    return run
