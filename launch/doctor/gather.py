"""What a bug report gathers: versions, the machine, the environment, a config, and the end of a run's logs."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.loading import load_config
from configs.memory import GIB
from configs.redact import is_secret_name
from configs.this_machine import count_cores
from launch.check.packages import PROJECT, installed_versions, pinned_versions, project_requirements
from launch.check.paths import existing
from launch.command import REPO_ROOT
from launch.gpus import list_gpus

_TAIL_BYTES = 1 << 16
_LOG_LINES = {"metrics.jsonl": 5, "validation.jsonl": 2, "events.jsonl": 20}
_OTHER_LOG_LINES = 40
# Variables that change how a run starts, finds its GPUs and others, or where it looks for models.
_VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|TORCHELASTIC|PYTORCH|PET|ACCELERATE|DEEPSPEED|FLUXFILL|SLURM|HF|HUGGINGFACE|TRANSFORMERS"
    r"|NVIDIA|OMP|MKL|TRITON)_\w+"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV"
    r"|CONDA_PREFIX|TMPDIR"
)


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    lines: tuple[str, ...]


def render(sections: Iterable[Section]) -> str:
    """The report as Markdown."""
    parts = []
    for section in sections:
        if not section.lines:
            continue
        longest = max((len(line) - len(line.lstrip("`")) for line in section.lines), default=0)
        fence = "`" * max(3, longest + 1)  # a log may hold a fence of its own
        parts.append(f"## {section.title}\n\n{fence}\n" + "\n".join(section.lines) + f"\n{fence}\n")
    return "\n".join(parts)


def gather(place: Path | None, environment: Mapping[str, str]) -> Iterator[Section]:
    """The sections of a report, with secrets still in them.

    place: a run's folder or a config; None: of the machine alone. Raises InputError if it is neither.
    """
    yield Section("Versions", tuple(_versions()))
    yield Section("Machine", tuple(_machine()))
    yield Section("Environment", tuple(_environment(environment)))
    if place is None:
        return
    run, config = _find(place)
    if config is not None:
        yield Section(f"Config {config}", tuple(_config(config)))
    if run is not None:
        yield Section(f"Run {run}", tuple(_run(run)))
        yield from _logs(run)


def _find(place: Path) -> tuple[Path | None, Path | None]:
    """(run's folder, config) that a path means, each None if it is not there."""
    if place.is_dir():
        config = place / "config.yaml"
        if not config.is_file() and not any((place / name).exists() for name in ("outcome.json", "metrics.jsonl")):
            raise InputError(
                f"{place}: no folder of a run (config.yaml, metrics.jsonl). Give runs/NAME, or the YAML file of a "
                "config."
            )
        return place, config if config.is_file() else None
    if not place.is_file():
        raise InputError(f"{place}: neither a run's folder nor a config. Give runs/NAME, or a YAML file.")
    try:
        run = load_config(place).run.folder
    except InputError:
        return None, place  # what is wrong with it stands in the section
    return (run if run.is_dir() else None), place


def _versions() -> Iterator[str]:
    installed, tested = installed_versions(), pinned_versions()
    commit = (
        subprocess.run(
            ["git", "-C", str(REPO_ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("git")
        else None
    )
    at = f" at commit {commit.stdout.strip()}" if commit and commit.returncode == 0 else ""
    yield f"{PROJECT} {installed.get(PROJECT, '(not installed)')}{at}"
    yield f"Python {platform.python_version()} ({sys.executable})"
    for name in sorted({requirement.name for requirement in project_requirements()}):
        version = installed.get(name, "not installed")
        note = f"  (tested: {tested[name]})" if tested.get(name, version) != version.partition("+")[0] else ""
        yield f"{name} {version}{note}"


def _machine() -> Iterator[str]:
    yield f"{platform.platform()}, {' '.join(platform.libc_ver())}"
    memory = dict(_read_pairs(Path("/proc/meminfo"), ":"))
    total, available = (int(memory.get(key, "0").split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    model = dict(_read_pairs(Path("/proc/cpuinfo"), ":")).get("model name", platform.machine())
    yield f"{count_cores()} of {os.cpu_count()} CPU cores, {model}"
    yield f"{total:.1f} GiB of memory, {available:.1f} GiB available"
    gpus = list_gpus({})  # all of them: the environment is told apart
    yield f"{len(gpus)} GPUs" + (f", driver {gpus[0].driver}" if gpus else ": no NVIDIA driver answers")
    for gpu in gpus:
        capability = ".".join(map(str, gpu.capability))
        yield (
            f"  GPU {gpu.index}: {gpu.name}, capability {capability}, {gpu.used_gib:.1f} of {gpu.memory_gib:.1f} GiB "
            "in use"
        )
    for place in dict.fromkeys((Path.cwd(), Path(os.environ.get("TMPDIR", "/tmp")), Path("/dev/shm"))):
        if place.exists():
            yield _disk(place)


def _disk(place: Path) -> str:
    usage = shutil.disk_usage(existing(place))
    return f"{place}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"


def _read_pairs(path: Path, separator: str) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        key, _, value = line.partition(separator)
        yield key.strip(), value.strip()


def _environment(environment: Mapping[str, str]) -> Iterator[str]:
    """Variables that matter; of one whose name tells of a secret, only that it is set."""
    for name, value in sorted(environment.items()):
        if is_secret_name(name) or name.endswith("_KEY"):
            if _VARIABLES.fullmatch(name):
                yield f"{name} is set"
        elif _VARIABLES.fullmatch(name):
            yield f"{name}={value}"


def _config(path: Path) -> Iterator[str]:
    """The file as it is, which shows more than what was made of it; and what is wrong with it."""
    try:
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
        config = load_config(path)
    except OSError as error:
        yield f"# cannot be read ({error.strerror})"
        return
    except InputError as error:
        yield "# what is wrong with it:"
        yield from (f"# {line}" for line in str(error).splitlines())
        return
    for key, place in (("run.dir", config.run.dir), ("data.cache", config.data.cache)):
        if isinstance(place, Path):
            yield f"# {key}: {_disk(place)}"


def _run(run: Path) -> Iterator[str]:
    outcome = run / "outcome.json"
    yield f"outcome: {_tail(outcome, 1)[0] if outcome.is_file() else 'none: it is running, or was killed'}"
    checkpoints = sorted((run / "checkpoints").glob("*"))
    yield f"{len(checkpoints)} entries in checkpoints"
    for folder in checkpoints:
        size = sum(map(_file_size, folder.rglob("*")))
        complete = "complete" if (folder / "COMPLETE").is_file() else "not complete"
        yield f"  {folder.name}: {complete}, {size / 2**20:.1f} MiB"
    others = sorted(path.name for path in run.glob("*") if path.name != "checkpoints")
    yield f"beside them: {', '.join(others)}"


def _file_size(path: Path) -> int:
    """0 of what is no file, or gone: a run that goes on removes its old checkpoints."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _logs(run: Path) -> Iterator[Section]:
    """The ends of the run's JSON lines and of every *.log and *.out beside them."""
    logs = [run / name for name in _LOG_LINES] + sorted([*run.glob("*.log"), *run.glob("*.out"), *run.glob("*.err")])
    for log in logs:
        if log.is_file():
            count = _LOG_LINES.get(log.name, _OTHER_LOG_LINES)
            yield Section(f"The last lines of {log.name}", tuple(_tail(log, count)))


def _tail(path: Path, count: int) -> list[str]:
    """The last lines of a file; never more than 64 KiB of it."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]
    return lines[-count:] or ["(empty)"]
