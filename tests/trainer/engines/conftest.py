"""Launches of real processes (gloo, CPU) that run the real trainer, made once a session and looked at by many tests."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.trainer.engines.runs import AS_ON_GPUS, HALF, SETTINGS, Run, go_on_from, train


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Where all of them are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def shared_runs() -> set[str]:
    """Names of those that several files look at."""
    return set()


@pytest.fixture(scope="module", autouse=True)
def no_runs_of_other_files(runs, shared_runs, request) -> Iterator[None]:
    """A run takes 200 MB, and there are a hundred and fifty: a file's own go with it, unless a test has failed."""
    yield
    for folder in runs.iterdir():
        if folder.is_dir() and folder.name not in shared_runs and not request.session.testsfailed:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def launch(config, runs) -> Callable[..., Run]:
    """Runs the trainer, or `function` in its place: `launch(engine, processes, name, "key=value", ...)`."""
    from configs.loading import dump_config

    path = runs / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")

    def run(engine: str, num_processes: int, name: str, *overrides: str, function=train) -> Run:
        # Of one process the plain run. Those of several, which are held against it, have on what they have on GPUs.
        as_on_gpus = () if engine == "single" else AS_ON_GPUS
        returned = run_ranks(
            engine,
            num_processes,
            function,
            ["--config", str(path), f"run.dir={runs}", f"run.name={name}", *SETTINGS, *as_on_gpus, *overrides],
            node_size=num_processes // 2 if engine == "hsdp" else None,
        )
        return Run(runs / name, returned)

    return run


@pytest.fixture(scope="session")
def undisturbed(launch, shared_runs) -> Callable[[str, int], Run]:
    """A run of 4 steps with checkpoints at 2 and 4: `undisturbed(engine, processes)`, made once."""
    made: dict[tuple[str, int], Run] = {}

    def run(engine: str, num_processes: int) -> Run:
        if (engine, num_processes) not in made:
            name = f"{engine}-{num_processes}"
            shared_runs.add(name)
            made[engine, num_processes] = launch(engine, num_processes, name)
        return made[engine, num_processes]

    return run


@pytest.fixture(scope="session")
def resumed(launch, undisturbed, shared_runs) -> Callable[..., Run]:
    """A run that was stopped after 2 steps of one launch and went on under another, made once."""
    made: dict[tuple, Run] = {}

    def run(before: tuple[str, int], after: tuple[str, int]) -> Run:
        if (before, after) not in made:
            halves = go_on_from(undisturbed(*before).folder, "-".join(map(str, (*before, "then", *after))), HALF)
            shared_runs.add(halves.name)
            made[before, after] = launch(*after, halves.name)
        return made[before, after]

    return run
