"""What a system without POSIX leaves: every name that Windows' Python lacks is used in a few modules alone, and one
process imports, reads, writes and trains without them. None of it has run on a real Windows."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.windows import LACKING, LACKING_MODULES, ROOT, write_sitecustomize

# One matter each, with what is done where the name is lacking.
MODULES_WITH_A_FALLBACK = {
    "configs/this_machine.py",
    "configs/supervision.py",
    "trainer/process/watchdog.py",
    "data/storage/file_handle.py",
    "data/storage/file_locks.py",
}
LINUX_ONLY = ("launch/slurm/", "demo/soak_faults.py")  # where there is SLURM, and a soak kills processes
IMPORT_ALL = """
import importlib, os, pkgutil
for top in ("configs", "launch", "data", "trainer.process"):
    package = importlib.import_module(top)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print(hasattr(os, "preadv"))
"""


def posix_names(path: Path) -> list[str]:
    """What a file uses of what Windows' Python lacks, as `line: name`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if name in LACKING.get(module, ()):
                found.append(f"{node.lineno}: {module}.{name}")
            case ast.ImportFrom(module=str(module)):
                lacking = LACKING_MODULES if module in LACKING_MODULES else LACKING.get(module, ())
                names = [alias.name for alias in node.names]
                found += [f"{node.lineno}: {module}.{name}" for name in names if module in lacking or name in lacking]
            case ast.Import(names=modules):
                found += [f"{node.lineno}: {alias.name}" for alias in modules if alias.name in LACKING_MODULES]
            case ast.Call(func=ast.Attribute(attr="CDLL"), args=[ast.Constant(value=None)]):
                found.append(f"{node.lineno}: CDLL(None)")
    return found


@pytest.fixture
def windows(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that starts as on Windows, of a user who has set accelerate's variables, which its
    launcher would set too."""
    (tmp_path / "windows").mkdir()
    write_sitecustomize(tmp_path / "windows")
    own = {"PYTHONPATH": str(tmp_path / "windows"), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_MIXED_PRECISION": "no"}
    return os.environ | own


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("top", ["configs", "data", "launch", "trainer", "demo"])
def test_names_that_windows_lacks_stand_in_a_few_modules(top):
    used = {path.relative_to(ROOT).as_posix(): posix_names(path) for path in (ROOT / top).rglob("*.py")}
    held = {path: names for path, names in used.items() if not path.startswith(LINUX_ONLY)}
    assert {path: names for path, names in held.items() if names and path not in MODULES_WITH_A_FALLBACK} == {}
    assert all(used[path] for path in MODULES_WITH_A_FALLBACK if path.startswith(f"{top}/")), (
        "take it out: it uses none"
    )


@pytest.mark.parametrize(
    "text, found",
    [
        ("import os\nos.preadv(1, [], 0)", ["2: os.preadv"]),
        ("from os import pread, fsync", ["1: os.pread"]),
        ("def f():\n    import fcntl", ["2: fcntl"]),
        ("from fcntl import flock", ["1: fcntl.flock"]),
        ("import signal\nsignal.SIGUSR1", ["2: signal.SIGUSR1"]),
        ("import ctypes\nctypes.CDLL(None)", ["2: CDLL(None)"]),
        ("import os, signal\nos.fsync(1), signal.SIGTERM", []),
    ],
)
def test_a_name_that_windows_lacks_is_found(tmp_path, text, found):
    (tmp_path / "a.py").write_text(text)
    assert posix_names(tmp_path / "a.py") == found


def test_every_module_can_be_imported(windows):
    done = run(windows, "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n", "nothing was taken away"


def test_a_cache_is_read_and_files_are_written(windows):
    """The tests of the reader on stored caches, and of atomic files, pass without what Windows lacks."""
    tests = ["tests/data/cache/test_format_v1.py", "tests/data/storage/test_atomic_write.py"]
    done = run(windows, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["train", "configs/demo.yaml", "--num-processes", "2"],
            "with 2 processes needs Linux, or WSL2",
        ),
        (["retire", "a.py", "--after", "runs/a", "--backup", "old"], "fluxfill retire needs file locks"),
    ],
)
def test_what_needs_another_system_is_refused(windows, arguments, said):
    done = run(windows, "-m", "launch", *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr


@pytest.mark.slow
def test_one_process_preprocesses_and_trains(windows, demo_config, tiny_model, triples, tmp_path):
    folders = [f"data.datasets.0.{role}={triples / role}" for role in ("target", "source", "mask")]
    places = [f"model.base={tiny_model}", f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path}", *folders]
    short = ["train.steps=2", "train.warmup_steps=0", "validation.every_steps=null", "checkpoint.every_steps=2"]
    done = run(windows, "-m", "launch", "train", "configs/demo.yaml", "--num-processes", "1", *places, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trainer/main.py" in done.stdout and "accelerate.commands.launch" not in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (tmp_path / "demo" / "checkpoints" / "step-00000002" / "COMPLETE").is_file()
    assert (tmp_path / "demo" / "final" / "model_index.json").is_file()
