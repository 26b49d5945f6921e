"""The arrows of the house: configs <- data <- trainer, and configs, data <- launch; between the rooms of data/ and of
trainer/; and names that hide nothing."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "configs": set(),
    "data": {"configs"},
    "trainer": {"configs", "data"},
    "launch": {"configs", "data"},
    "demo": {"configs", "data", "trainer", "launch"},
    "benchmarks": {"configs", "data", "trainer", "launch", "demo"},
}
# The rooms of a package: each may import those to its left, and those to their left in other lines. The files beside
# the rooms (data/preprocess.py, trainer/main.py and what it calls by name) may import all, and no room imports them.
ROOMS = {
    "data": [
        "storage < sources < samples < encoders < cache < batches",
        "cache_layout < sources",
        "cache < preprocessing < online",
        "batches < online",
        "cache < show",
        "preprocessing < verify",
        "sources < migrate",
    ],
    "trainer": [
        "process < model < adapters < optimizers < engines < checkpoints < export",
        "checkpoints < validation",
        "export < evaluation",
        "validation < evaluation",
        "engines < simulation",
    ],
}
OURS = {*MAY_IMPORT, "tests"}
STARTED_AS_SCRIPTS = ("data", "trainer", "demo", "benchmarks")  # python puts the script's folder first on sys.path
SLOW_TO_IMPORT = ("torch", "diffusers", "transformers", "accelerate")
DUMPING_GROUNDS = {"utils", "util", "common", "helpers", "helper", "misc"}


def imported_names(path: Path, package: list[str]) -> Iterator[tuple[int, str]]:
    """Every import in a file, wherever it stands in it: line number and absolute dotted name.

    package: the parts of the package that the file is in, to resolve relative imports.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield node.lineno, module
            case ast.ImportFrom():
                parents = package[: len(package) + 1 - node.level]
                # `from .. import data` in a top-level package: no such parent, so the names themselves are meant
                tails = [node.module] if node.module else [alias.name for alias in node.names]
                yield from ((node.lineno, ".".join([*parents, tail])) for tail in tails)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(module)), *_]
            ) if called in ("import_module", "__import__", "run_module"):
                yield node.lineno, module


def broken_arrows(root: Path) -> list[str]:
    """Every import under root that goes against MAY_IMPORT, as `file:line: what imports what`."""
    broken = []
    for folder, allowed in MAY_IMPORT.items():
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root)
            for line, name in imported_names(path, list(place.parent.parts)):
                top = name.partition(".")[0]
                if top in OURS - allowed - {folder}:
                    broken.append(f"{place.as_posix()}:{line}: {folder} imports {name}")
    return broken


def rooms_below(lines: list[str]) -> dict[str, set[str]]:
    """Room -> all rooms that it may import."""
    below: dict[str, set[str]] = {}
    for line in lines:
        rooms = line.split(" < ")
        for left, right in pairwise(rooms):
            below.setdefault(left, set())
            below.setdefault(right, set()).add(left)
    for _ in below:  # as many passes as the longest way may have steps
        for rooms in below.values():
            rooms |= set().union(*(below[room] for room in rooms))
    return below


def broken_rooms(root: Path) -> list[str]:
    """Every import between the rooms of a package that goes against ROOMS, and every room that has no place there."""
    broken = []
    for package, lines in ROOMS.items():
        below = rooms_below(lines)
        for path in sorted((root / package).rglob("*.py")):
            place = path.relative_to(root)
            room = place.with_suffix("").parts[1]
            if room not in below:
                if len(place.parts) > 2:
                    broken.append(f"{place.as_posix()}: {room} has no place in ROOMS")
                continue
            for line, name in imported_names(path, list(place.parent.parts)):
                top, _, rest = name.partition(".")
                imported = rest.partition(".")[0]
                if top == package and imported != room and imported not in below[room]:
                    broken.append(f"{place.as_posix()}:{line}: {room} imports {name}")
    return broken


def hiding_names(root: Path, dependencies: set[str]) -> list[str]:
    """Files that would be found in the place of another module, or whose name says nothing about their subject.

    dependencies: import names of the packages that we depend on.
    """
    top_level = OURS | {path.name for path in root.iterdir() if path.is_dir()}
    hiding = []
    for folder in (*MAY_IMPORT, "tests"):
        hidden = set(dependencies) if folder in (*STARTED_AS_SCRIPTS, "launch") else set()
        if folder in STARTED_AS_SCRIPTS:
            hidden |= top_level | sys.stdlib_module_names
        for path in sorted((root / folder).rglob("*.py")):
            module = path.parent if path.name == "__init__.py" else path.with_suffix("")
            hides = module.parent == root / folder and module.name in hidden
            if hides or module.name in DUMPING_GROUNDS:
                hiding.append(path.relative_to(root).as_posix())
    return hiding


def slow_imports(root: Path, package: str) -> list[str]:
    """What of SLOW_TO_IMPORT is loaded by importing every module of a package, and through which of our files."""
    script = """
import importlib, pkgutil, sys, traceback
root, package, *slow = sys.argv[1:]
sys.path.insert(0, root)
importers = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in slow:
            stack = [f for f in traceback.extract_stack() if f.filename.startswith(root + "/")]
            ours = [f"{f.filename[len(root) + 1:]}:{f.lineno}" for f in stack if "site-packages" not in f.filename]
            importers.setdefault(name, " > ".join(ours))
sys.meta_path.insert(0, Watch())
package = importlib.import_module(package)
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in slow:
    if name in sys.modules:
        print(f"{importers[name]} imports {name}")
"""
    command = [sys.executable, "-c", script, str(root), package, *SLOW_TO_IMPORT]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def dependencies_import_names() -> set[str]:
    """The import names of everything that pyproject.toml depends on, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    wanted = {distribution_key(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}
    installed = importlib.metadata.packages_distributions()
    return {name for name, owners in installed.items() if wanted & {distribution_key(owner) for owner in owners}}


def distribution_key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """A made-up repository: path -> text, and an empty __init__.py in each of the four packages."""
    for folder in ("configs", "data", "trainer", "launch"):
        files = {f"{folder}/__init__.py": "", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_imports_point_one_way():
    for package in ("configs", "data", "trainer", "launch"):
        assert (ROOT / package / "__init__.py").is_file(), f"{package}/ is not a package: nothing was checked"
    assert broken_arrows(ROOT) == []


def test_the_rooms_of_a_package_import_one_way():
    for package, lines in ROOMS.items():
        rooms = {path.name for path in (ROOT / package).iterdir() if list(path.glob("*.py"))}
        files = {path.stem for path in (ROOT / package).glob("*.py")}
        assert set(rooms_below(lines)) <= rooms | files, "a room that is gone is held to nothing"
    assert broken_rooms(ROOT) == []


def test_launch_imports_nothing_slow():
    assert slow_imports(ROOT, "launch") == []


def test_no_file_hides_a_module():
    names = dependencies_import_names()
    assert {"torch", "accelerate", "yaml", "PIL"} <= names
    assert hiding_names(ROOT, names) == []


def test_a_users_own_data_folder_hides_no_package(tmp_path):
    """python -c puts the folder where the user stands first on sys.path; our packages are found all the same."""
    (tmp_path / "data" / "target_images").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "my_run.yaml").write_text("version: 1\n")
    script = "import data, configs, trainer, launch; print(data.__file__, configs.__file__, sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stderr}\nIs fluxfill installed in this environment? make install"
    assert result.stdout.splitlines() == [str(ROOT / "data" / "__init__.py"), str(ROOT / "configs" / "__init__.py")]


@pytest.mark.parametrize(
    "path, text, message",
    [
        ("configs/schema.py", "import data", "configs/schema.py:1: configs imports data"),
        ("configs/schema.py", "from launch.gpus import GPUS", "configs/schema.py:1: configs imports launch.gpus"),
        ("data/reader.py", "\nfrom trainer import flux", "data/reader.py:2: data imports trainer"),
        ("data/deep/reader.py", "from ... import trainer", "data/deep/reader.py:1: data imports trainer"),
        ("trainer/main.py", "def run():\n    import launch.plan", "trainer/main.py:2: trainer imports launch.plan"),
        ("launch/cli.py", "from trainer.main import main", "launch/cli.py:1: launch imports trainer.main"),
        ("launch/cli.py", "from .. import trainer", "launch/cli.py:1: launch imports trainer"),
        (
            "launch/cli.py",
            "import importlib\nimportlib.import_module('trainer.main')",
            "launch/cli.py:2: launch imports trainer.main",
        ),
        (
            "launch/cli.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trainer.flux",
            "launch/cli.py:3: launch imports trainer.flux",
        ),
        ("data/sources.py", "import demo.photographs", "data/sources.py:1: data imports demo.photographs"),
        ("trainer/main.py", "from tests import conftest", "trainer/main.py:1: trainer imports tests"),
        ("demo/run.py", "import tests.data", "demo/run.py:1: demo imports tests.data"),
    ],
)
def test_an_arrow_against_the_rule_is_found(tmp_path, path, text, message):
    assert broken_arrows(write_tree(tmp_path, {path: text})) == [message]


@pytest.mark.parametrize(
    "path, text, message",
    [
        (
            "data/storage/retry.py",
            "from data.cache.a import b",
            "data/storage/retry.py:1: storage imports data.cache.a",
        ),
        (
            "data/cache_layout.py",
            "import data.storage.a",
            "data/cache_layout.py:1: cache_layout imports data.storage.a",
        ),
        ("data/cache/a.py", "from ..batches import b", "data/cache/a.py:1: cache imports data.batches"),
        ("data/show/a.py", "def f():\n    import data.online.a", "data/show/a.py:2: show imports data.online.a"),
        ("data/verify/a.py", "from data.preprocess import b", "data/verify/a.py:1: verify imports data.preprocess"),
        ("data/verify/a.py", "from data import cache", "data/verify/a.py:1: verify imports data"),
        ("data/attic/a.py", "", "data/attic/a.py: attic has no place in ROOMS"),
        ("trainer/model/a.py", "import trainer.engines.a", "trainer/model/a.py:1: model imports trainer.engines.a"),
        ("trainer/export/a.py", "import trainer.method", "trainer/export/a.py:1: export imports trainer.method"),
    ],
)
def test_an_upward_import_is_found(tmp_path, path, text, message):
    assert broken_rooms(write_tree(tmp_path, {path: text})) == [message]


def test_imports_down_the_rooms_pass(tmp_path):
    files = {
        "data/preprocess.py": "from data.preprocessing.run import preprocess",
        "data/online/a.py": "import data.batches.a, data.preprocessing.a, data.cache_layout, data.online.b",
        "data/sources/a.py": "from data.cache_layout import MANIFEST",
        "trainer/main.py": "import trainer.validation.a, trainer.method",
        "trainer/method.py": "import trainer.adapters.a, trainer.run_log",
        "trainer/engines/a.py": "from data.batches.a import b\nfrom trainer.model.a import b",
    }
    assert broken_rooms(write_tree(tmp_path, files)) == []


def test_arrows_along_the_rule_pass(tmp_path):
    files = {
        "data/reader.py": "import numpy\nfrom configs.schema import Config\nfrom data import a\nfrom . import b",
        "trainer/main.py": "import data.reader\nfrom configs import loading\nfrom .flux import load_transformer",
        "launch/cli.py": "import database, launcher\nimport data.manifest\nfrom configs.loading import load_config",
        "demo/run.py": "import trainer.main, launch.cli, demo.photographs",
    }
    assert broken_arrows(write_tree(tmp_path, files)) == []


@pytest.mark.parametrize(
    "path",
    [
        "trainer/data.py",
        "trainer/launch/__init__.py",
        "trainer/types.py",
        "trainer/logging.py",
        "trainer/deepspeed.py",
        "demo/configs.py",
        "launch/accelerate.py",
        "data/utils.py",
        "data/common/__init__.py",
        "tests/data/helpers.py",
    ],
)
def test_a_hiding_name_is_found(tmp_path, path):
    assert hiding_names(write_tree(tmp_path, {path: ""}), {"accelerate", "deepspeed"}) == [path]


def test_harmless_names_pass(tmp_path):
    files = {
        name: "" for name in ("launch/slurm.py", "configs/types.py", "trainer/guard/data.py", "slurm/train.sbatch")
    }
    assert hiding_names(write_tree(tmp_path, files), {"accelerate"}) == []


def test_a_slow_import_is_found_through_other_packages(tmp_path):
    files = {
        "torch/__init__.py": "",
        "data/reader.py": "import torch",
        "launch/cli.py": "def main():\n    import diffusers",
        "launch/plan.py": "import data.reader",
    }
    assert slow_imports(write_tree(tmp_path, files), "launch") == [
        "launch/plan.py:1 > data/reader.py:1 imports torch",
    ]
