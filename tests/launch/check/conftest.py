"""A right config of a few of the demo's triples and the tiny model, whose pieces may be damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from configs.loading import dump_config
from configs.schema import Config
from launch.check.situation import Situation, load_situation
from launch.cli import app

NUM_PICTURES = 6
FEW_STEPS = ["train.steps=20", "train.global_batch_size=2", "train.micro_batch_size=2", "train.warmup_steps=0"]


@pytest.fixture
def folder(triples: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with target/, source/, mask/ and model/."""
    names = sorted(path.stem for path in (triples / "target").glob("*.png"))[:NUM_PICTURES]
    for role in ("target", "source", "mask"):
        (tmp_path / role).mkdir()
        for name in names:
            for path in (triples / role).glob(f"{name}.*"):
                shutil.copy(path, tmp_path / role)
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path


@pytest.fixture
def make_config(demo_config: Callable[..., Config], folder: Path) -> Callable[..., Config]:
    """`make_config("key=value", ...)`."""
    given = [f"data.datasets.0.{role}={folder / role}" for role in ("target", "source", "mask")]
    given += [f"run.dir={folder / 'runs'}", f"model.base={folder / 'model'}", "data.holdout=0", *FEW_STEPS]
    return lambda *overrides: demo_config(folder / "cache", *given, *overrides)


@pytest.fixture
def config_file(make_config: Callable[..., Config], folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(dump_config(make_config()), encoding="utf-8")
    return path


@pytest.fixture
def situate(config_file: Path) -> Callable[..., Situation]:
    """`situate("key=value", ..., gpus=(), processes=None)`."""

    def make(*overrides: str, gpus: tuple = (), processes: int | None = None) -> Situation:
        situation, checks = load_situation(str(config_file), overrides, processes, gpus)
        assert situation is not None, checks
        return situation

    return make


@pytest.fixture
def progress() -> Progress:
    return Progress(disable=True)


@pytest.fixture
def check(config_file: Path) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """(exit code, checks) of `fluxfill check` on the config: `check("key=value", ..., "--option")`; without steps."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        result = CliRunner().invoke(app, ["check", str(config_file), "--json", "--no-steps", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, json.loads(result.stdout)["checks"]

    return run
