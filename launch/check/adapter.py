"""The adapter that a run starts from, read by the trainer against the base's layers and the method."""

import subprocess
from collections.abc import Iterator

from configs.supervision import BAD_INPUT
from launch.check.result import Check, ok
from launch.check.situation import Situation
from launch.command import render_adapter_check


def check_adapter(situation: Situation) -> Iterator[Check]:
    """Whether `method.init_from` can go on, if it is given and there (else the check of paths tells)."""
    start = getattr(situation.config.method, "init_from", None)
    if start is None or not start.exists():
        return
    command = render_adapter_check(situation.config_path, situation.overrides)
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode == 0:
        yield ok("adapter", f"method.init_from {start} fits the base and the method")
        return
    is_told = ended.returncode == BAD_INPUT
    lines = [line for line in (ended.stdout if is_told else ended.stderr).splitlines() if line.strip()]
    told = lines if is_told else lines[-1:] if ended.returncode > 0 else []  # of a traceback; a signal leaves none
    what = told[0].rstrip(".:") if told else f"method.init_from {start}: reading it ended with {ended.returncode}"
    cure = "Change the method as it says, or start from another adapter."
    yield Check("adapter", "error", what, cure, tuple(line.strip() for line in told[1:]))
