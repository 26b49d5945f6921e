"""The engine of a run: chosen by what the process was launched with, and checked against the config."""

import os
import secrets
import time
from collections.abc import Mapping, MutableMapping
from platform import node

import torch

from configs.combinations import ENGINES, check_engine
from configs.errors import InputError
from configs.schema import Config
from trainer.engines.base import Engine
from trainer.engines.fsdp import FsdpEngine, HsdpEngine
from trainer.engines.replicated import DdpEngine, SingleEngine
from trainer.engines.zero import Zero1Engine, Zero2Engine, Zero3Engine

_STALE_SECONDS = 60.0  # for which a node may remember, over NFS, that a folder was not there

WITH_COPIES = ("ddp", "hsdp")  # of trained weights, each of which is updated by a rank of its own

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
    leave_casting_to_the_trainer(os.environ)
    if config.train.deterministic:
        make_deterministic()
    engine = engine_class(name)(config, name)
    check_copies_stay_equal(config, engine)
    if engine.num_nodes > 1:
        check_run_folder_is_shared(config, engine)
    return engine


def leave_casting_to_the_trainer(environment: MutableMapping[str, str]) -> None:
    """Have accelerate cast nothing, whatever its own config or --mixed_precision says: it would put an autocast around
    DDP's model, and lay FSDP's frozen base out in fp32. bf16 the trainer has of itself, by model.precision. Raises
    InputError for what it has not."""
    told = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", "bf16"):
        raise InputError(
            f"accelerate was told mixed_precision {told}, in which this trainer does not compute. Launch it with "
            "--mixed_precision no, and set model.precision."
        )
    environment["ACCELERATE_MIXED_PRECISION"] = "no"


def make_deterministic() -> None:
    """From now on this process adds up in the same order each time; an operation that cannot raises RuntimeError. To be
    called before CUDA is initialized: cuBLAS then takes the workspace that it needs for it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it


def check_copies_stay_equal(config: Config, engine: Engine) -> None:
    """All ranks call it. Raises InputError where ranks hold copies of weights that are rounded at random, on GPUs of
    several kinds: what CUDA's generator draws from a seed depends on how many multiprocessors a GPU has, and nobody
    compares the copies again."""
    if config.train.weights == "bf16_stochastic" and engine.name in WITH_COPIES and len(engine.gpus) > 1:
        raise InputError(
            f"train.weights is bf16_stochastic under {engine.name}, but the GPUs are of several kinds "
            f"({', '.join(engine.gpus)}), which round the same weight differently: the copies would become other "
            "models. Use fsdp2, which holds each weight once, GPUs of one kind, or train.weights=fp32_master."
        )


def check_run_folder_is_shared(config: Config, engine: Engine) -> None:
    """All ranks call it. Raises InputError, on all of them, if one sees another folder at run.dir than rank 0: its part
    of every checkpoint would lie there."""
    folder = config.run.folder
    token = engine.ranks.broadcast_object(f".seen-{secrets.token_hex(8)}")
    if engine.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    engine.ranks.barrier()
    deadline = time.monotonic() + _STALE_SECONDS
    while not (seen := (folder / token).exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [name for name in engine.ranks.all_gather(None if seen else f"rank {engine.rank} on {node()}") if name]
    if engine.is_main:
        (folder / token).unlink()
    if blind:
        raise InputError(
            f"run.dir {config.run.dir.absolute()}: {', '.join(blind)} does not see there what rank 0 writes. Every "
            "node writes its part of a checkpoint: give run.dir a place that all of them share."
        )


def engine_class(name: str) -> type[Engine]:
    """The class of an engine. Raises InputError for a name that has none, as of a stage that DeepSpeed has not."""
    if name.removesuffix("-offload") not in _CLASSES:
        raise InputError(
            f"accelerate was told to start {name}, which is no engine of fluxfill. Take one of the files in "
            f"configs/engines/: {', '.join(ENGINES)}."
        )
    return _CLASSES[name.removesuffix("-offload")]
