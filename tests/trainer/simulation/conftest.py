"""Simulations of CUDA in a process of their own, where the pretended device stands before torch."""

import json
import os
import subprocess
import sys

import pytest

from tests.environment import with_gpus


@pytest.fixture(scope="session")
def simulate():
    """Function: what is asked of trainer/simulation/run.py, several at once -> what each takes."""

    def run(*asked: dict) -> list[dict]:
        usual = {"precision": "bf16", "side": 1024, "text": 512, "rows": 1, "checkpointed": None}
        lines = "\n".join(json.dumps(usual | one) for one in asked)
        command = [sys.executable, "-P", "-m", "trainer.simulation.run"]
        made = subprocess.run(command, input=lines, capture_output=True, text=True, env=with_gpus(os.environ))
        assert made.returncode == 0, made.stderr
        return [json.loads(line) for line in made.stdout.splitlines()]

    return run
