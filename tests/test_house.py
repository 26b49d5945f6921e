"""What the house promises of its files: short ones, and a test file for every module where a reader looks for it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("configs", "data", "trainer", "launch", "demo", "benchmarks")
MOST_LINES = 400

# Modules without a test file of their name, and why.
TESTED_ELSEWHERE = {
    "benchmarks/planning.py": "measures for minutes; what it calls is tested",
    "benchmarks/preprocess.py": "measures for minutes; what it calls is tested",
    "benchmarks/scan.py": "measures for minutes; what it calls is tested",
    "benchmarks/start.py": "measures for minutes; what it calls is tested",
    "benchmarks/verify.py": "measures for minutes; what it calls is tested",
    "demo/train_vae.py": "made demo/vae/ once, in an hour",
    "launch/gpus.py": "asks the driver how many GPUs there are",
}

# Test files that hold a property of several modules, and which.
ACROSS_MODULES = {
    "tests/test_contributing.py": "CONTRIBUTING.md",
    "tests/test_house.py": "all files",
    "tests/test_imports.py": "all imports",
    "tests/configs/test_recipes.py": "the YAML files of configs/",
    "tests/data/preprocessing/test_shared_job.py": "several workers on one cache, alive, dead and late",
    "tests/data/cache/test_format_v1.py": "a cache of format 1, kept as files",
    "tests/data/samples/test_variants.py": "recipes and sources, from the config to the bytes of the shards",
    "tests/data/test_sixty_triples.py": "scan, plan, encoding and report of a set with a fault of each kind",
    "tests/data/storage/test_object_stores.py": "S3 and GCS through every module that opens URLs",
    "tests/launch/test_preprocess_workers.py": "the ways in which a user starts several workers",
    "tests/trainer/test_online.py": "training runs that encode their own batches",
    "tests/trainer/checkpoints/test_version_1.py": "a checkpoint of version 1, kept as files",
    "tests/trainer/engines/test_adapter_runs.py": "adapters under every engine",
    "tests/trainer/engines/test_optimizer_runs.py": "optimizers under every engine",
    "tests/trainer/engines/test_resumed_launches.py": "checkpoints handed from launch to launch, under every engine",
}


def modules(root: Path) -> list[str]:
    """Every module outside tests/, as a path below root."""
    found = [path for top in TOPS for path in (root / top).rglob("*.py") if path.name != "__init__.py"]
    return sorted(path.relative_to(root).as_posix() for path in found)


def test_file_of(module: str) -> str:
    folder, _, name = module.rpartition("/")
    return f"tests/{folder}/test_{name}"


test_file_of.__test__ = False  # pytest takes it for a test by its name


def long_files(root: Path) -> list[str]:
    """Modules of more than MOST_LINES lines."""
    return [module for module in modules(root) if len((root / module).read_text().splitlines()) > MOST_LINES]


def untested(root: Path) -> list[str]:
    """Modules without the test file of their name."""
    return [module for module in modules(root) if not (root / test_file_of(module)).is_file()]


def strays(root: Path) -> list[str]:
    """Test files that are no module's."""
    mirrors = {test_file_of(module) for module in modules(root)}
    files = {path.relative_to(root).as_posix() for path in (root / "tests").rglob("test_*.py")}
    return sorted(files - mirrors)


def twins(root: Path) -> list[str]:
    """Test files that are no module's, of the name of one that is, or of another such file, but for a plural."""
    names: dict[str, list[str]] = {}
    mirrors = {test_file_of(module) for module in modules(root)}
    for path in sorted((root / "tests").rglob("test_*.py")):
        names.setdefault(path.stem.removesuffix("s"), []).append(path.relative_to(root).as_posix())
    return [file for files in names.values() if len(files) > 1 for file in files if file not in mirrors]


def test_no_file_is_longer_than_a_reader_holds():
    assert long_files(ROOT) == []


def test_every_module_has_the_test_file_of_its_name():
    assert [module for module in untested(ROOT) if module not in TESTED_ELSEWHERE] == []
    assert TESTED_ELSEWHERE.keys() <= set(untested(ROOT)), "take it out: it is tested, or gone"


def test_every_test_file_is_a_modules_or_says_what_it_holds():
    assert [file for file in strays(ROOT) if file not in ACROSS_MODULES] == []
    assert ACROSS_MODULES.keys() <= set(strays(ROOT)), "take it out: it is a module's, or gone"


def test_no_two_test_files_are_twins():
    assert twins(ROOT) == []


@pytest.mark.parametrize(
    "find, files, expected",
    [
        (long_files, {"data/a.py": "\n" * 401, "tests/data/test_a.py": "\n" * 500}, ["data/a.py"]),
        (long_files, {"data/a.py": "\n" * 400}, []),
        (untested, {"data/room/a.py": "", "tests/data/test_a.py": ""}, ["data/room/a.py"]),
        (untested, {"data/room/a.py": "", "tests/data/room/test_a.py": "", "data/__init__.py": ""}, []),
        (strays, {"data/room/a.py": "", "tests/data/test_a.py": ""}, ["tests/data/test_a.py"]),
        (twins, {"data/a.py": "", "tests/data/test_a.py": "", "tests/test_as.py": ""}, ["tests/test_as.py"]),
        (twins, {"tests/data/test_a.py": "", "tests/test_a.py": ""}, ["tests/data/test_a.py", "tests/test_a.py"]),
        (twins, {f"{top}{name}": "" for top in ("data/", "demo/", "tests/data/test_") for name in ("a.py",)}, []),
    ],
)
def test_what_breaks_the_promise_is_found(tmp_path, find, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert find(tmp_path) == expected
