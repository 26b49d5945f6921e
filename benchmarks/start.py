"""CPU seconds from the command to the first step of the demo's run, beside another build of this project.

    python benchmarks/start.py [--against FOLDER] [--out benchmarks/results/start.jsonl] [--repeats 5]

User and system time of all processes: the launcher's, the ranks', and of what they start, read when the first step
stands in metrics.jsonl; then the run is ended. Once without validation, and once with one picture in one sampler step
before the first step: sampling all 96 is work and no start.
FOLDER: a clone of another commit with a .venv of its own. Each build preprocesses a cache for itself. Runs alternate;
medians.
"""

import argparse
import os
import signal
import statistics
import subprocess
import tempfile
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

from benchmarks.record import add_result
from configs.supervision import list_children_of

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"single": 1, "ddp": 2}

VALIDATION = {False: ["validation.every_steps=null"], True: ["validation.images=1", "validation.sampler_steps=1"]}

_TICKS = os.sysconf("SC_CLK_TCK")
_MAKE_INPUTS = """
import sys
from pathlib import Path
from demo.photographs import write_triples
from demo.tiny_model import build_tiny_model
write_triples(Path(sys.argv[1], "triples"))
build_tiny_model(Path(sys.argv[1], "model"))
"""


def make_inputs(build: Path, folder: Path) -> None:
    """The demo's triples, its model and its cache below `folder`, by the programs of `build`."""
    subprocess.run([program(build, "python"), "-c", _MAKE_INPUTS, folder], cwd=build, check=True, capture_output=True)
    preprocess = [program(build, "fluxfill"), "preprocess", "configs/demo.yaml", *overrides(folder)]
    subprocess.run(preprocess, cwd=build, check=True, stdout=subprocess.DEVNULL)


def program(build: Path, name: str) -> str:
    return str(build / ".venv" / "bin" / name)


def overrides(folder: Path) -> list[str]:
    """The demo's config, all of it below `folder`."""
    paths = [f"data.datasets.0.{role}={folder}/triples/{role}" for role in ("target", "source", "mask")]
    return [*paths, f"model.base={folder}/model", f"data.cache={folder}/cache", f"run.dir={folder}/runs"]


def cpu_until_first_step(build: Path, folder: Path, engine: str, *, validates: bool) -> float:
    """CPU seconds of one start. Raises RuntimeError if the run ends before its first step."""
    metrics = folder / "runs" / "demo" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    launch = [program(build, "accelerate"), "launch", "--config_file", f"configs/engines/{engine}.yaml"]
    launch += ["--num_processes", str(ENGINES[engine]), "--main_process_port", "0"]
    command = [*launch, "trainer/main.py", "--config", "configs/demo.yaml", "--resume", "never", *overrides(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += VALIDATION[validates]
    with tempfile.TemporaryFile() as output:
        run = subprocess.Popen(command, cwd=build, env=environment, stdout=output, stderr=output)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if run.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(f"{build}: {engine} ended before its first step\n{output.read().decode()}")
                time.sleep(0.02)
            return sum(map(cpu_seconds, processes_below(run.pid)))
        finally:
            end_all(run)


def processes_below(process: int) -> list[int]:
    """A process and its descendants, the eldest first: a launcher that is ended first has nothing to say."""
    found = [process]
    for parent in found:
        found += list_children_of(parent)
    return found


def end_all(run: subprocess.Popen) -> None:
    """End a process, unless it has been waited for, and all that it has started."""
    if run.poll() is None:
        for process in processes_below(run.pid):
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(process, signal.SIGKILL)
        run.wait()


def cpu_seconds(process: int) -> float:
    """User and system time of a process, and of its children that have ended; none of one that has just ended, which
    its parent's has."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, after_name[11:15])) / _TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a clone of another commit, with its .venv")
    parser.add_argument("--out", type=Path, help="append the results to this file, a JSON line each")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    builds = {"this": ROOT} | ({"against": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder, name) for name in builds}
        for name, build in builds.items():
            folders[name].mkdir()
            make_inputs(build, folders[name])
        cases = list(product(ENGINES, VALIDATION))
        seconds: dict = {case: {name: [] for name in builds} for case in cases}
        for _ in range(options.repeats + 1):
            for (engine, validates), (name, build) in product(cases, builds.items()):
                spent = cpu_until_first_step(build, folders[name], engine, validates=validates)
                seconds[engine, validates][name].append(spent)
    for (engine, validates), of in seconds.items():
        # The first start of each fills caches (bytecode, pages).
        medians = {name: round(statistics.median(values[1:]), 2) for name, values in of.items()}
        case = {"engine": engine, "processes": ENGINES[engine], "validates": validates}
        line = {"benchmark": "start", **case, "cpu_seconds": medians}
        if options.against is not None:
            line |= {"against": commit_of(options.against), "ratio": round(medians["this"] / medians["against"], 3)}
        add_result(line, options.out)


def commit_of(build: Path) -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=build, check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
