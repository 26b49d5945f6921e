"""What the checks look at: the config, and how it would be started on this machine."""

from dataclasses import dataclass

from configs.combinations import check_engine
from configs.errors import InputError, WhatAndCure
from configs.loading import load_config
from configs.schema import Config, EngineName
from launch.check.result import Check, error_of, ok
from launch.command import choose_engine
from launch.gpus import Gpu, count_training_gpus, gpus_of_a_node, refuse_missing_gpus


@dataclass(frozen=True)
class Situation:
    """config: validated, from config_path and overrides as they were given.  engine, processes: as `fluxfill train`
    would choose them.  gpus: those that this process may use."""

    config: Config
    config_path: str
    overrides: tuple[str, ...]
    engine: EngineName
    processes: int
    gpus: tuple[Gpu, ...]


def load_situation(
    config_path: str, overrides: tuple[str, ...], num_processes: int | None, gpus: tuple[Gpu, ...]
) -> tuple[Situation | None, list[Check]]:
    """The config with the start that it would have, and a check for every problem with the two; None if there is one.

    num_processes: as asked for; None: one per GPU.
    """
    try:
        config = load_config(config_path, overrides)
    except InputError as error:
        return None, [_check_of(problem) for problem in error.args]
    try:
        refuse_missing_gpus(config.data, max(len(gpus), gpus_of_a_node(config.slurm) or 0))
        num_gpus = count_training_gpus(len(gpus), config.data.encoder_devices)
        engine, processes = choose_engine(config.parallel.engine, num_processes, num_gpus)
        check_engine(config, engine)
    except InputError as error:
        return None, [_check_of(problem) for problem in error.args]
    noun = "process" if processes == 1 else "processes"
    what = f"{config_path}: run {config.run.name}, {config.method.type} under {engine} with {processes} {noun}"
    return Situation(config, config_path, overrides, engine, processes, gpus), [ok("config", what)]


def _check_of(problem: WhatAndCure | str) -> Check:
    if isinstance(problem, WhatAndCure):
        return Check("config", "error", *problem)
    return error_of("config", InputError(problem))
