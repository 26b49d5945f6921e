"""Whoever runs the tests, and where, changes nothing about them."""

import logging
import os
import re
import shutil
import subprocess
import sys

from configs.gpu_profiles import FOLDER, gpu_names, profile_files
from tests.conftest import ROOT
from tests.environment import NOTING, forget_the_machine, process_of_before
from trainer.process import launcher


def test_a_machines_own_variables_are_taken_out_and_the_rest_stays():
    kept = {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "HF_HOME": "/hf", "CUDA_HOME": "/cuda", "RANKING": "1"}
    foreign = ("FORCE_COLOR", "COLUMNS", "SLURM_JOB_ID", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    foreign += ("http_proxy", "HTTPS_PROXY", "no_proxy", "AWS_PROFILE", "HF_HUB_OFFLINE", "HF_TOKEN", "FLUXFILL_HOLD")
    found = kept | dict.fromkeys(foreign, "x") | {"OMP_NUM_THREADS": "8"}
    forget_the_machine(found)
    assert found == kept | {"OMP_NUM_THREADS": "1"}


def test_a_profile_of_whoever_runs_the_tests_is_none_of_theirs(tmp_path, monkeypatch):
    own = tmp_path / ".config" / "fluxfill" / "gpus"
    own.mkdir(parents=True)
    shutil.copy(FOLDER / "a100-40gb.yaml", own / "lab.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(profile_files()) == gpu_names()
    listed = "from configs.gpu_profiles import profile_files; print(*profile_files())"
    command = [sys.executable, "-c", listed]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split() == gpu_names()


def test_what_a_program_left_in_this_process_is_gone():
    logger = logging.getLogger("fluxfill")
    before = dict(os.environ), logger.level, logger.propagate, [*logger.handlers], launcher.is_training()
    with process_of_before():
        os.environ["LEFT"] = "x"
        os.environ.pop("PATH")
        logger.setLevel(1)
        logger.propagate = not logger.propagate
        logger.addHandler(logging.NullHandler())
        launcher.save_before_the_end()
        assert launcher.is_training()
    assert (dict(os.environ), logger.level, logger.propagate, logger.handlers, launcher.is_training()) == before


def test_every_module_that_notes_something_of_its_process_is_known():
    """The watchdog forgets by itself, at the end of the time in which it watches."""
    noting = {f"trainer.process.{name}" for name in ("launcher", "run_owner", "starts", "stop_signals", "watchdog")}
    found = [path for top in ("configs", "data", "trainer", "launch") for path in (ROOT / top).rglob("*.py")]
    found = [
        path.relative_to(ROOT).with_suffix("") for path in found if re.search(r"^ +global \w", path.read_text(), re.M)
    ]
    assert {".".join(path.parts) for path in found} == noting
    assert {module.__name__ for module in NOTING} == noting - {"trainer.process.watchdog"}
