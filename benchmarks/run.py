"""`make bench`: the benchmarks that suit this machine, a line each, and docs/performance.md from what they found.

    python benchmarks/run.py [NAME ...] [--list]

A benchmark's results are replaced when it has come to its end, and stay where it fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import page

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Benchmark:
    """name: of its program and of its results.  calls: the arguments of each of its calls.  lacks: what this machine
    has not, or None.  appends: it goes on from its earlier results, which are not replaced."""

    name: str
    calls: tuple[tuple[str, ...], ...] = ((),)
    lacks: Callable[[], str | None] = lambda: None
    appends: bool = False


def _gpu() -> str | None:
    there = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
    return None if there else "no NVIDIA GPU"


def _cores() -> str | None:
    return None if (os.cpu_count() or 1) >= 2 else "one core"


def _compiler() -> str | None:
    from shutil import which

    return None if any(map(which, ("g++", "clang++", "c++"))) else "no C++ compiler for the pretended GPU"


BENCHMARKS = (
    Benchmark("gpu", lacks=_gpu, appends=True),
    Benchmark("before_after", lacks=_compiler),
    Benchmark("step_cost", lacks=_compiler),
    Benchmark("overhead"),
    Benchmark("peer"),
    Benchmark("checkpoint"),
    Benchmark("scaling", lacks=_cores),
    Benchmark("guard", lacks=_cores),
    Benchmark("planning", (("--triples", "100000"),)),
    Benchmark("order"),
    Benchmark("reader", (("--batch-sizes", "2", "1", "4"),)),
    Benchmark("preprocess"),
    Benchmark("scan", (("--pictures", "png", "--triples", "160"), ("--triples", "400"))),
    Benchmark("verify"),
    Benchmark("cache_size"),
    Benchmark("old_way"),
    Benchmark("grid"),
    Benchmark("demo_run"),
    Benchmark("help"),
)


def run(benchmark: Benchmark, results: Path) -> bool:
    """Whether it came to its end, or does not suit the machine. Says so in a line."""
    program = ROOT / "benchmarks" / f"{benchmark.name}.py"
    lacks = benchmark.lacks() if program.exists() else "it is not here"
    if lacks is not None:
        print(f"{benchmark.name:<14}left out: {lacks}", flush=True)
        return True
    target, start = results / f"{benchmark.name}.jsonl", time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = target if benchmark.appends else Path(folder, target.name)
        for arguments in benchmark.calls:
            command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", "--out", str(out), *arguments]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            seconds = f"{time.monotonic() - start:.0f} s"
            if done.returncode or not out.exists():
                said = f"{benchmark.name:<14}FAILED after {seconds}, exit code {done.returncode}"
                print(said, *done.stdout.strip().splitlines()[-15:], sep="\n", flush=True)
                return False
        if not benchmark.appends:
            results.mkdir(parents=True, exist_ok=True)
            target.write_bytes(out.read_bytes())
    print(f"{benchmark.name:<14}{seconds}, {target.read_text(encoding='utf-8').count(chr(10))} result(s)", flush=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of some of them; all by default")
    parser.add_argument("--list", action="store_true", help="name them, and what this machine lacks for one")
    options = parser.parse_args(arguments)
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if unknown := set(options.names) - set(known):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}. There are: {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(BENCHMARKS)
    if options.list:
        for benchmark in chosen:
            print(f"{benchmark.name:<14}{benchmark.lacks() or 'can run here'}")
        return 0
    all_done = all([run(benchmark, page.RESULTS) for benchmark in chosen])
    page.main()
    print(f"{page.PAGE.relative_to(ROOT)} is written", flush=True)
    return 0 if all_done else 1


if __name__ == "__main__":
    sys.exit(main())
