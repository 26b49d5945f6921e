"""The engine of a run: chosen by what the process was launched with, and checked against the config."""

import os
from collections.abc import Mapping

from configs.combinations import ENGINES, check_engine
from configs.errors import InputError
from configs.schema import Config
from trainer.engines.base import Engine
from trainer.engines.fsdp import FsdpEngine, HsdpEngine
from trainer.engines.replicated import DdpEngine, SingleEngine
from trainer.engines.zero import Zero1Engine, Zero2Engine, Zero3Engine

# Offload is a setting of the engine file, on top of these.
_CLASSES: dict[str, type[Engine]] = {
    "single": SingleEngine,
    "ddp": DdpEngine,
    "fsdp2": FsdpEngine,
    "hsdp": HsdpEngine,
    "zero1": Zero1Engine,
    "zero2": Zero2Engine,
    "zero3": Zero3Engine,
}


def launched_engine(environment: Mapping[str, str]) -> str:
    """The engine that `accelerate launch` was told to start, from the variables it sets."""
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        offload = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") == "cpu"
        return f"zero{stage}" + ("-offload" if offload else "")
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
            return "hsdp"
        return "fsdp2-offload" if environment.get("FSDP_OFFLOAD_PARAMS") == "true" else "fsdp2"
    return "ddp" if int(environment.get("WORLD_SIZE", "1")) > 1 else "single"


def start_engine(config: Config) -> Engine:
    """Join the processes of the run under the engine they were launched with.

    Raises InputError if the config asks for another engine, or for something that this one cannot do.
    """
    name = launched_engine(os.environ)
    asked = config.parallel.engine
    if asked not in ("auto", name):
        raise InputError(
            f"parallel.engine is {asked}, but this process was started as {name}. Start it by `fluxfill train`, or "
            f"`accelerate launch --config_file configs/engines/{asked}.yaml ...`, or set parallel.engine={name}."
        )
    check_engine(config, name)
    return engine_class(name)(config, name)


def engine_class(name: str) -> type[Engine]:
    """The class of an engine. Raises InputError for a name that has none, as of a stage that DeepSpeed has not."""
    if name.removesuffix("-offload") not in _CLASSES:
        raise InputError(
            f"accelerate was told to start {name}, which is no engine of fluxfill. Take one of the files in "
            f"configs/engines/: {', '.join(ENGINES)}."
        )
    return _CLASSES[name.removesuffix("-offload")]
