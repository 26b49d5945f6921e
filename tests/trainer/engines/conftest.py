"""Launches of real processes (gloo, CPU) that run the real trainer, made once a session and looked at by many tests."""

from collections.abc import Callable

import pytest

from tests.ranks import run_ranks
from tests.trainer.engines.runs import AS_ON_GPUS, HALF, SETTINGS, Run, go_on_from, train


@pytest.fixture(scope="session")
def launch(config, tmp_path_factory) -> Callable[..., Run]:
    """Runs the trainer, or `function` in its place: `launch(engine, processes, name, "key=value", ...)`."""
    from configs.loading import dump_config

    runs = tmp_path_factory.mktemp("runs")
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
def undisturbed(launch) -> Callable[[str, int], Run]:
    """A run of 4 steps with checkpoints at 2 and 4: `undisturbed(engine, processes)`, made once."""
    made: dict[tuple[str, int], Run] = {}

    def run(engine: str, num_processes: int) -> Run:
        if (engine, num_processes) not in made:
            made[engine, num_processes] = launch(engine, num_processes, f"{engine}-{num_processes}")
        return made[engine, num_processes]

    return run


@pytest.fixture(scope="session")
def resumed(launch, undisturbed) -> Callable[..., Run]:
    """A run that was stopped after 2 steps of one launch and went on under another, made once."""
    made: dict[tuple, Run] = {}

    def run(before: tuple[str, int], after: tuple[str, int]) -> Run:
        if (before, after) not in made:
            halves = go_on_from(undisturbed(*before).folder, "-".join(map(str, (*before, "then", *after))), HALF)
            made[before, after] = launch(*after, halves.name)
        return made[before, after]

    return run
