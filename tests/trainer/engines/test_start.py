"""One list of engines, and a start under the one that was asked for."""

import inspect
from pathlib import Path

import pytest

from configs.combinations import ENGINES
from configs.errors import InputError
from tests.ranks import launch_environment
from trainer.engines.start import engine_class, launched_engine, start_engine

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
