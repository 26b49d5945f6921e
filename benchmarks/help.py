"""Seconds of `fluxfill --help` and of a plan from tables, each beside the bare import of the packages that it loads.

    python benchmarks/help.py [--out benchmarks/results/help.jsonl] [--repeats 15]

The packages are found by running the command and looking which modules come from elsewhere. One process each, turn by
turn, so that a busy machine is as busy for all; medians of user and system time, and of the clock. All modules are
compiled before.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from benchmarks.record import add_result

ROOT = Path(__file__).resolve().parent.parent
_RUN = "from launch.cli import main; main()"
_RUN_ALL = """
import importlib
from launch.cli import COMMANDS
for place, _ in COMMANDS.values():
    importlib.import_module(place.partition(":")[0])
"""
_IMPORT = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
_SAY = """
import atexit, sys
def say(before=set(sys.modules)):
    files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
    loaded = [name for name, file in files.items() if name not in before and "site-packages" in file]
    print(" ".join(loaded), file=sys.stderr)
atexit.register(say)
"""


def python(code: str, *arguments: str) -> list[str]:
    """The command that runs code, as the entry point of an installed program does."""
    return [sys.executable, "-P", "-c", code, *arguments]


def packages_of(code: str, arguments: list[str]) -> list[str]:
    """Modules of other packages that code loads, in that order."""
    made = subprocess.run(python(_SAY + code, *arguments), capture_output=True, text=True, check=True, cwd=ROOT)
    return made.stderr.splitlines()[-1].split()


def seconds_of(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """User and system time of a process, and the clock's."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=environment)
    after, end = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, end - start


def measure(repeats: int) -> dict[str, tuple[float, ...]]:
    """Medians, by name: of --help, of a plan, of the import of the packages of each, and of those of all commands."""
    asked = {"help": ["--help"], "plan": ["plan", "configs/fill_full.yaml", "--gpu", "h100-80gb", "--nodes", "4"]}
    commands = {"packages of all commands": python(_IMPORT, *packages_of(_RUN_ALL, []))}
    for name, arguments in asked.items():
        commands[f"packages of {name}"] = python(_IMPORT, *packages_of(_RUN, arguments))
        commands[name] = python(_RUN, *arguments)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as compiled:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        for turn in range(repeats + 1):
            for name, command in commands.items():
                spent = seconds_of(command, environment)
                if turn > 0:  # the first one compiles
                    seconds[name].append(spent)
    return {name: tuple(map(statistics.median, zip(*found, strict=True))) for name, found in seconds.items()}


def main() -> None:
    """Measure, print, and append a line to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    found = measure(asked.repeats)
    for name, which in product(("help", "plan"), ("its", "all commands'")):
        packages = found["packages of all commands" if which != "its" else f"packages of {name}"]
        for kind, seconds, others in zip(("CPU", "clock"), found[name], packages, strict=True):
            print(f"{name} {kind:5} {seconds:.3f} s; {which} packages {others:.3f} s: {seconds / others:.2f} x")
    add_result({"benchmark": "help", "repeats": asked.repeats, "seconds of CPU and clock": found}, asked.out)


if __name__ == "__main__":
    main()
