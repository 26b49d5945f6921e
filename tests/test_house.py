"""What the house promises of its files: short ones, and a test file for every module where a reader looks for it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("configs", "data", "trainer", "launch", "demo", "benchmarks")
MOST_LINES = 400

# Modules without a test file of their name, and why.
TESTED_ELSEWHERE = {
    "benchmarks/count_flux.py": "counts for minutes; what it calls is tested",
    "benchmarks/grid.py": "measures for minutes; what it calls is tested",
    "benchmarks/guard.py": "measures for minutes; what it calls is tested",
    "benchmarks/help.py": "measures for minutes; what it calls is tested",
    "benchmarks/mid_size.py": "the job of several benchmarks, which their tests run",
    "benchmarks/page_data.py": "parts of the page that test_page.py renders",
    "benchmarks/page_step.py": "parts of the page that test_page.py renders",
    "benchmarks/page_tables.py": "tables of the page that test_page.py renders",
    "benchmarks/planning.py": "measures for minutes; what it calls is tested",
    "benchmarks/preprocess.py": "measures for minutes; what it calls is tested",
    "benchmarks/rank_imports.py": "every rank of the tests has these imports",
    "benchmarks/ranks.py": "tests/ranks.py starts every rank with it",
    "benchmarks/scan.py": "measures for minutes; what it calls is tested",
    "benchmarks/start.py": "measures for minutes; what it calls is tested",
    "benchmarks/verify.py": "measures for minutes; what it calls is tested",
    "launch/arguments.py": "arguments, which the tests of every command use",
    "trainer/check_adapter.py": "started by launch/check/adapter.py, whose test looks at both ends",
    "demo/train_vae.py": "made demo/vae/ once, in an hour",
}

# Test files that hold a property of several modules, and which.
ACROSS_MODULES = {
    "tests/benchmarks/test_readme.py": "figures of both READMEs against the results",
    "tests/test_contributing.py": "CONTRIBUTING.md",
    "tests/test_environment.py": "the variables, the logger and the notes of the tests' own process",
    "tests/test_docs.py": "docs/, and the messages that name its pages",
    "tests/test_house.py": "all files",
    "tests/test_imports.py": "all imports",
    "tests/test_reliability.py": "docs/reliability.md, and the tests that inject a fault",
    "tests/test_security.py": "all files, and secrets in everything that a run writes",
    "tests/test_windows.py": "all files, under a Python without POSIX",
    "tests/configs/test_recipes.py": "the YAML files of configs/",
    "tests/data/preprocessing/test_shared_job.py": "several workers on one cache",
    "tests/data/preprocessing/test_shared_job_kills.py": "several workers on one cache, of which some die or sleep",
    "tests/data/preprocessing/test_run_errors.py": "what preprocessing/run.py refuses, and leaves when it fails",
    "tests/data/cache/test_node_cache_damage.py": "damaged copies in cache/node_cache.py",
    "tests/data/sources/test_picture_modes.py": "modes, transparency and colours in sources/pictures.py",
    "tests/data/sources/test_scan_remote.py": "sources/scan.py on servers and in buckets",
    "tests/data/sources/test_table_values.py": "CSV, Parquet and Arrow in sources/tables.py",
    "tests/data/cache/test_format_v1.py": "a cache of format 1, kept as files",
    "tests/data/cache/test_format_v2.py": "a cache of format 2, kept as files, beside that of format 1",
    "tests/data/preprocessing/test_older_cache.py": "preprocessing, repair and training on format 1",
    "tests/data/samples/test_variants.py": "recipes and sources, from the config to the bytes of the shards",
    "tests/data/test_sixty_triples.py": "scan, plan, encoding and report of a set with a fault of each kind",
    "tests/data/storage/test_object_stores.py": "S3 and GCS through every module that opens URLs",
    "tests/demo/test_hand_over.py": "a run's report, evaluation and exports, from the run to their readers",
    "tests/launch/test_preprocess_workers.py": "the ways in which a user starts several workers",
    "tests/launch/slurm/test_job_ends.py": "chains, restarts and notices in slurm/job.py",
    "tests/launch/test_supervise_folder.py": "the run's folder in supervise.py: what was there, and disks that fail",
    "tests/trainer/test_clock.py": "a run whose clock jumps",
    "tests/trainer/test_ends.py": "code, outcome, status and SLURM's decision of every end of a run",
    "tests/trainer/test_full_disk.py": "a run whose disk fills up",
    "tests/trainer/test_hangs.py": "a rank that is stopped in the middle of a run",
    "tests/slurm/test_batch_scripts.py": "batch scripts of docs/running.md, and ours as a real sbatch reads them",
    "tests/slurm/test_preprocessing_jobs.py": "preprocessing as an array on a real SLURM",
    "tests/slurm/test_cluster.py": "the SLURM of two nodes that tests/slurm starts",
    "tests/slurm/test_job_status.py": "fluxfill status, asked of a real SLURM",
    "tests/slurm/test_preflight_jobs.py": "the preflight of jobs on a real SLURM",
    "tests/slurm/test_training_jobs.py": "training jobs on a real SLURM, undisturbed",
    "tests/slurm/test_signals_to_jobs.py": "signals to training jobs on a real SLURM",
    "tests/slurm/test_requeued_jobs.py": "jobs that others end, or that lose a process or a node, on a real SLURM",
    "tests/slurm/test_time_limits.py": "time limits on a real SLURM",
    "tests/slurm/test_refused_jobs.py": "jobs that cannot train, on a real SLURM",
    "tests/slurm/test_srun_steps.py": "what srun does with a step's line on a real SLURM",
    "tests/slurm/test_leaked_variables.py": "preprocessing workers in jobs of a real SLURM",
    "tests/trainer/test_on_a_gpu.py": "arithmetic, memory and clocks of a GPU",
    "tests/trainer/test_online.py": "training runs that encode their own batches",
    "tests/trainer/adapters/test_adapters_v1.py": "adapters of version 1, kept as files",
    "tests/configs/test_config_v1.py": "a config of version 1, kept as a file",
    "tests/trainer/checkpoints/test_version_1.py": "a checkpoint of version 1, kept as files",
    "tests/trainer/validation/test_averaged_weights.py": "validation.weights ema, in validation/validator.py",
    "tests/trainer/engines/test_adapter_runs.py": "adapters under every engine",
    "tests/trainer/engines/test_compiled_runs.py": "compiled blocks under fsdp2",
    "tests/trainer/engines/test_memory_choices.py": "micro-batches and checkpointed blocks under every engine",
    "tests/trainer/engines/test_guarded_runs.py": "skips, rollbacks and the guard's stop, under real launches",
    "tests/trainer/engines/test_optimizer_runs.py": "optimizers under every engine",
    "tests/trainer/engines/test_resumed_launches.py": "checkpoints handed from launch to launch, under every engine",
}


def modules(root: Path) -> list[str]:
    """Every module outside tests/, as a path below root."""
    found = [path for top in TOPS for path in (root / top).rglob("*.py") if path.name != "__init__.py"]
    return sorted(path.relative_to(root).as_posix() for path in found)


def mirror_of(module: str) -> str:
    folder, _, name = module.rpartition("/")
    return f"tests/{folder}/test_{name}"


def long_files(root: Path) -> list[str]:
    """Modules and files of tests/ of more than MOST_LINES lines."""
    tests = sorted(path.relative_to(root).as_posix() for path in (root / "tests").rglob("*.py"))
    return [file for file in modules(root) + tests if len((root / file).read_text().splitlines()) > MOST_LINES]


def untested(root: Path) -> list[str]:
    """Modules without the test file of their name."""
    return [module for module in modules(root) if not (root / mirror_of(module)).is_file()]


def strays(root: Path) -> list[str]:
    """Test files that are no module's."""
    mirrors = {mirror_of(module) for module in modules(root)}
    files = {path.relative_to(root).as_posix() for path in (root / "tests").rglob("test_*.py")}
    return sorted(files - mirrors)


def twins(root: Path) -> list[str]:
    """Test files that are no module's, of the name of one that is, or of another such file, but for a plural."""
    names: dict[str, list[str]] = {}
    mirrors = {mirror_of(module) for module in modules(root)}
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
        (long_files, {"data/a.py": "\n" * 401, "tests/test_a.py": "\n" * 401}, ["data/a.py", "tests/test_a.py"]),
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
