"""`fluxfill train` on pictures that nobody has encoded: real workers on the demo's triples."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import InputError
from configs.loading import dump_config
from data.cache.open_cache import Cache
from launch import command as launch_command
from launch.cli import app
from launch.preprocess_first import reason_to_train_at_once
from tests.holding import HOLD
from tests.other_user import as_nobody
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
NUM_PICTURES = 6
FEW_STEPS = ["train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2", "train.warmup_steps=0"]
FEW_STEPS += ["validation.every_steps=null", "logging.trackers=[]", "data.holdout=0"]


@pytest.fixture
def pictures(triples: Path, tmp_path: Path) -> Path:
    """A few of the demo's triples, in folders that may be changed."""
    for number in range(NUM_PICTURES):
        add_picture(tmp_path / "triples", triples, number)
    return tmp_path / "triples"


def add_picture(folder: Path, triples: Path, number: int) -> None:
    name = sorted(path.stem for path in (triples / "target").glob("*.png"))[number]
    for role in ("target", "source", "mask"):
        (folder / role).mkdir(parents=True, exist_ok=True)
        for path in (triples / role).glob(f"{name}.*"):
            shutil.copy(path, folder / role)


@pytest.fixture
def make_config(demo_config: Callable, pictures: Path, tmp_path: Path) -> Callable:
    """The config of a run of two steps on these pictures: `make_config("key=value", ...)`."""
    folders = [f"data.datasets.0.{role}={pictures / role}" for role in ("target", "source", "mask")]
    given = [*folders, f"run.dir={tmp_path / 'runs'}", "run.name=first", *FEW_STEPS]
    return lambda *overrides: demo_config(tmp_path / "cache", *given, *overrides)


@pytest.fixture
def config_file(make_config: Callable, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config()), encoding="utf-8")
    return path


def start_train(config_file: Path, *overrides: str, held_until: Path | None = None) -> subprocess.Popen:
    """held_until: the file that the test makes to let a worker go on, which waits before it takes a shard."""
    line = [sys.executable, "-c", "from launch.cli import main; main()", "train", str(config_file), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if held_until is not None:
        environment |= {"HOLD_AT": "/claims/shards.", "HOLD_UNTIL": str(held_until)}
        environment["PYTHONPATH"] = f"{HOLD}{os.pathsep}{ROOT}"
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(config_file: Path, *overrides: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `fluxfill train`."""
    process = start_train(config_file, *overrides)
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def num_samples(cache: Path) -> int:
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    return sum(count for splits in manifest["samples"].values() for count in splits.values())


def held_worker(cache: Path, held_until: Path) -> int:
    """The process id of the one worker, once it is held."""
    deadline = time.monotonic() + PATIENCE
    while not held_until.with_name(f"{held_until.name}.held").exists():
        assert time.monotonic() < deadline, "no worker came"
        time.sleep(0.01)
    (found,) = (cache / "crew" / "workers").glob("*.json")
    return json.loads(found.read_text(encoding="utf-8"))["pid"]


def test_first_run_is_one_command_that_may_be_stopped_and_goes_on(config_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start_train(config_file, held_until=tmp_path / "go")
    worker = held_worker(cache, tmp_path / "go")
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "preprocessing: stopped by SIGUSR1; the same command goes on" in errors
    assert "accelerate" not in output and not (cache / "manifest.json").exists()
    assert not Path(f"/proc/{worker}").exists()

    code, output, errors = train(config_file)
    assert code == 0, errors
    assert output.startswith(f"fluxfill preprocess {config_file}  # workers: 1\n")
    assert output.index(f"{NUM_PICTURES} of {NUM_PICTURES} samples were encoded now") < output.index("trainer/main.py")
    assert num_samples(cache) == NUM_PICTURES and not list(cache.rglob("*.part"))
    assert (tmp_path / "runs" / "first" / "final").is_dir()

    code, output, errors = train(config_file, "train.steps=3", "--dry-run")
    assert code == 0, errors
    assert output.startswith("not preprocessed first: ") and "goes on from a checkpoint" in output


def test_pictures_that_were_added_are_encoded_before_the_next_run(
    config_file: Path, pictures: Path, triples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "main.py").touch()  # which trains nothing
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(launch_command, "REPO_ROOT", tmp_path)
    monkeypatch.setattr("launch.train.count_gpus", lambda environment: 2)
    for name in ("first", "second"):
        result = CliRunner().invoke(app, ["train", str(config_file), f"run.name={name}"])
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"fluxfill preprocess {config_file} run.name={name}  # workers: 2\n")
        assert num_samples(tmp_path / "cache") == NUM_PICTURES + (name == "second")
        add_picture(pictures, triples, NUM_PICTURES)


def test_bad_pictures_end_it_with_2_before_anything_is_trained(config_file: Path, pictures: Path) -> None:
    lonely = sorted((pictures / "mask").iterdir())[0]
    lonely.unlink()
    code, output, errors = train(config_file)
    assert code == 2 and "accelerate" not in output
    assert f"no mask of the same name in {pictures / 'mask'}" in errors
    assert errors.endswith("preprocessing: not finished; what is wrong stands above\n") and "Traceback" not in errors


def test_dry_run_prints_both_commands_and_runs_none(config_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(config_file), "train.lr=1e-4", "--dry-run"])
    first, second = result.stdout.splitlines()
    assert result.exit_code == 0
    assert first.startswith(f"fluxfill preprocess {config_file} train.lr=1e-4")
    assert second.endswith(f"trainer/main.py --config {config_file} train.lr=1e-4")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


@pytest.fixture
def finished(cache: Cache, demo_config: Callable, tmp_path: Path) -> Callable:
    """The config of a run on a finished cache: `finished("key=value", ...)`."""
    return lambda *overrides: demo_config(cache.folder, f"run.dir={tmp_path}", *overrides)


def test_a_finished_cache_is_compared_with_its_pictures(finished: Callable) -> None:
    assert reason_to_train_at_once(finished(), "a.yaml") is None
    assert reason_to_train_at_once(finished("data.datasets.0.source=null"), "a.yaml") is None, "others are encoded"


def test_never_trains_on_what_is_there_and_names_the_command_if_nothing_is(
    finished: Callable, make_config: Callable
) -> None:
    assert reason_to_train_at_once(finished("data.preprocess=never"), "a.yaml") == "data.preprocess is never"
    with pytest.raises(
        InputError, match=r"no finished cache is there.*never\. Run `fluxfill preprocess a\.yaml` first"
    ):
        reason_to_train_at_once(make_config("data.preprocess=never"), "a.yaml")


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["data.mode=online"], "online"),
        (["data.cache=https://host/cache", "data.local_cache=/tmp/copies"], "data.cache is a URL"),
        (["data.datasets.0.mask=/nowhere/mask"], r"not on this machine \(/nowhere/mask\)"),
        (["data.datasets.0={name: photographs, tars: '/nowhere/{0..7}.tar'}"], r"not on this machine \(/nowhere\)"),
        (["data.datasets.0={name: photographs, table: /nowhere/a.jsonl}"], r"not on this machine \(/nowhere/a.jsonl\)"),
    ],
)
def test_a_cache_that_cannot_be_made_here_is_trained_on(finished: Callable, overrides: list[str], reason: str) -> None:
    assert re.search(reason, reason_to_train_at_once(finished(*overrides), "a.yaml") or "")


def test_a_complete_cache_that_cannot_be_written_to_is_trained_on(finished: Callable, monkeypatch) -> None:
    """Another user's, or one on a mount that is read only."""
    config = finished()
    monkeypatch.setattr(os, "access", lambda path, mode: path != config.data.cache)
    assert "cannot be written to" in (reason_to_train_at_once(config, "a.yaml") or "")
    with pytest.raises(InputError, match="was made by other settings"):
        reason_to_train_at_once(finished("data.resolution=96"), "a.yaml")


def test_a_run_that_goes_on_keeps_its_pictures_while_the_cache_is_complete(
    finished: Callable, make_config: Callable, tmp_path: Path
) -> None:
    for config in (finished("run.name=begun"), make_config(f"run.dir={tmp_path}", "run.name=begun")):
        marker = config.run.folder / "checkpoints" / "step-00000007" / "COMPLETE"
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    assert "goes on from a checkpoint" in (reason_to_train_at_once(finished("run.name=begun"), "a.yaml") or "")
    assert reason_to_train_at_once(config, "a.yaml") is None, "its cache is not complete"


def test_a_run_that_went_back_to_its_beginning_may_take_other_pictures(finished: Callable) -> None:
    """All that it had saved is set aside, as by --resume never: its order is not fixed."""
    config = finished("run.name=begun")
    aside = config.run.folder / "checkpoints" / "step-00000007.undone" / "COMPLETE"
    aside.parent.mkdir(parents=True)
    aside.touch()
    assert reason_to_train_at_once(config, "a.yaml") is None


@pytest.mark.parametrize("override", ["data.captions.trigger=sofa", "data.resolution=96", "data.holdout=4"])
def test_a_finished_cache_of_other_settings_is_not_replaced_unasked(finished: Callable, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(InputError, match=rf"(?s)was made by other settings:\n  {key} is .*`fluxfill preprocess"):
        reason_to_train_at_once(finished(override), "a.yaml")


def test_a_cache_that_this_user_may_not_look_into_is_a_message(make_config: Callable, tmp_path: Path) -> None:
    config = make_config()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0)
    try:
        with as_nobody(), pytest.raises(InputError, match=r"cannot be read \(Permission denied\)\. .*ask its owner"):
            reason_to_train_at_once(config, "a.yaml")
    finally:
        (tmp_path / "cache").chmod(0o755)
