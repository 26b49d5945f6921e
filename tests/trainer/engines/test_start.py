"""One list of engines, and a start under the one that was asked for."""

import inspect
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.ranks import launch_environment
from configs.combinations import ENGINES
from configs.errors import InputError
from tests.ranks import run_ranks
from trainer.engines.start import check_copies_stay_equal, engine_class, launched_engine, start_engine

FILES = Path(__file__).parents[3] / "configs" / "engines"


def test_the_engine_files_are_the_engines_of_the_schema():
    assert sorted(path.stem for path in FILES.iterdir()) == sorted(ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_has_a_class_and_is_known_by_what_its_file_makes_of_the_environment(engine):
    world_size = {"WORLD_SIZE": "1" if engine == "single" else "4"}
    assert launched_engine(launch_environment(engine, 4) | world_size) == engine
    assert not inspect.isabstract(engine_class(engine))


def test_an_engine_that_was_not_asked_for_is_refused(config, monkeypatch):
    parallel = config.parallel.model_copy(update={"engine": "fsdp2"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"parallel\.engine is fsdp2, but this process was started as ddp"):
        start_engine(config.model_copy(update={"parallel": parallel}))


def test_accelerate_casts_nothing_whatever_its_own_config_says(config, monkeypatch):
    for told in ("fp16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        with pytest.raises(InputError, match=rf"told mixed_precision {told}.*set model\.precision"):
            start_engine(config)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    start_engine(config)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize(
    "engine, weights, gpus, equal",
    [
        ("ddp", "bf16_stochastic", ["H100", "L40S"], False),
        ("hsdp", "bf16_stochastic", ["H100", "L40S"], False),
        ("ddp", "bf16_stochastic", ["H100"], True),
        ("fsdp2", "bf16_stochastic", ["H100", "L40S"], True),
        ("ddp", "fp32_master", ["H100", "L40S"], True),
    ],
)
def test_copies_that_each_rank_rounds_at_random_want_gpus_of_one_kind(config, engine, weights, gpus, equal):
    config = config.model_copy(update={"train": config.train.model_copy(update={"weights": weights})})
    of_ranks = SimpleNamespace(name=engine, gpus=gpus)
    with nullcontext() if equal else pytest.raises(InputError, match=rf"under {engine}, but .*H100, L40S.* Use fsdp2"):
        check_copies_stay_equal(config, of_ranks)


def test_a_deterministic_run_has_torch_and_cublas_keep_one_order(config, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for asked in (False, True):
        train = config.train.model_copy(update={"deterministic": asked})
        try:
            start_engine(config.model_copy(update={"train": train}))
            assert torch.are_deterministic_algorithms_enabled() is asked
            assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if asked else None)
        finally:
            torch.use_deterministic_algorithms(False)


def test_an_engine_that_there_is_not_is_refused(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(InputError, match=r"zero0, which is no engine.*configs/engines/: single, ddp"):
        start_engine(config)


def test_more_processes_than_accelerate_sees_are_refused(config, engine, monkeypatch):
    """They would train one model each, and say nothing."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RuntimeError, match="3 processes were started, accelerate sees 1"):
        type(engine)(config, "single")


def start_at(config, folder: Path, own_folders: bool) -> str:
    """What a rank on a node of its own is told."""
    import trainer.engines.start

    trainer.engines.start._STALE_SECONDS = 0.5
    place = folder / os.environ["RANK"] if own_folders else folder
    run = config.run.model_copy(update={"dir": place, "name": "run"})
    try:
        start_engine(config.model_copy(update={"run": run}))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("own_folders", [False, True])
def test_nodes_that_see_other_folders_are_refused_on_all_of_them(config, tmp_path, own_folders):
    told = run_ranks("ddp", 2, start_at, config, tmp_path, own_folders, node_size=1)
    for what in told:
        assert ("rank 1 on " in what and "does not see there what rank 0 writes" in what) == own_folders
        assert own_folders or what == ""
    assert not list(tmp_path.rglob(".seen-*"))  # now that rank 0, which takes the mark away, has ended too
