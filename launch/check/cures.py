"""Settings with which a GPU's memory holds what it does not: the fewest that do so by the same formula. They are tried
together, as one alone is often not enough."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Protocol

from configs.combinations import FSDP, OFFLOAD, ZERO3, combination_of, refuse
from configs.data_schema import DataConfig
from configs.memory import GIB, USABLE
from configs.schema import Config
from launch.check.situation import Situation
from launch.plan.settings import Settings, cached_settings, smaller_settings, with_settings, written

_COUNTS = (2, 4, 8, 16, 32, 64)  # of GPUs that share the state
_ENCODERS: tuple[Settings, ...] = ({}, {"encoders.t5_precision": "int8"}, {"encoders.t5": "cpu"})


class Needs(Protocol):
    """The bytes that training under an engine takes of a GPU."""

    def __call__(self, config: Config, engine: str, processes: int) -> float: ...


def cure_of_training(situation: Situation, needs: Needs, gpu_gib: float, *, encodes: bool) -> str:
    """What to do where a GPU does not hold training.  encodes: whether encoders share it."""
    config, engine, processes = situation.config, situation.engine, situation.processes
    room = USABLE * gpu_gib * GIB
    ways = []
    for settings in _of_training(config, engine, processes, encodes=encodes):
        changed, under = with_settings(config, settings), str(settings.get("parallel.engine", engine))
        if refuse(combination_of(changed, under)) is None and (taken := needs(changed, under, processes)) <= room:
            ways.append(_set(settings, taken))
            break
    shares = engine if engine in (*FSDP, *ZERO3) and engine != "hsdp" else "fsdp2"
    if (config.method.type == "full" or not ways) and refuse(combination_of(config, shares)) is None:
        more = next((n for n in _COUNTS if n > processes and needs(config, shares, n) <= room), None)
        if more is not None:
            also = "" if shares == engine else f" parallel.engine={shares}"
            ways.append(f"share the state among more GPUs (--num-processes {more}{also})")
    enough = "" if ways else " No setting is enough; `fluxfill plan` knows what else there is."
    return _sentence([*ways, _larger("train", needs(config, engine, processes))]) + enough


def cure_of_encoding(data: DataConfig, needs: Callable[[DataConfig], float], gpu_gib: float) -> str:
    """What to do where a GPU does not hold preprocessing."""
    sizes: list[Settings] = [{"encode_batch_size": size} for size in (4, 1) if size < data.encode_batch_size]
    ways = []
    for settings in _fewest_first([{}, *sizes], _ENCODERS):
        taken = needs(with_settings(data, settings))
        if taken <= USABLE * gpu_gib * GIB:
            ways.append(_set({f"data.{key}": value for key, value in settings.items()}, taken))
            break
    return _sentence([*ways, _larger("encode", needs(data))]) + ("" if ways else " No setting is enough.")


def _of_training(config: Config, engine: str, processes: int, *, encodes: bool) -> list[Settings]:
    """All that may help, alone and together."""
    engines: list[Settings] = []
    if processes > 1 and engine not in (*FSDP, *ZERO3):
        engines.append({"parallel.engine": "fsdp2"})
    if engine not in OFFLOAD:
        engines.append({"parallel.engine": "fsdp2-offload"})
    simple: list[Settings] = [cached_settings(config)] if encodes else []
    if config.train.micro_batch_size not in ("auto", 1):
        simple.append({"train.micro_batch_size": 1})
    if config.train.activation_checkpointing not in ("auto", True):
        simple.append({"train.activation_checkpointing": True})
    return _fewest_first(*([{}, each] for each in simple), [{}, *smaller_settings(config)], [{}, *engines])


def _fewest_first(*choices: Sequence[Settings]) -> list[Settings]:
    """One of each of the choices, in every way, those with the fewest keys first; of as many those of the first
    choices, which cost the least. Without the one that changes nothing."""
    together = [dict(pair for part in reversed(ways) for pair in part.items()) for ways in product(*reversed(choices))]
    return sorted(filter(None, together), key=len)


def _set(settings: Settings, taken: float) -> str:
    return f"set {' '.join(written(settings))}, with which it takes {taken / GIB:.1f} GiB"


def _larger(verb: str, needed: float) -> str:
    return f"{verb} on a GPU of {math.ceil(needed / USABLE / GIB)} GiB or more"


def _sentence(ways: Sequence[str]) -> str:
    said = "; or ".join(ways)
    return f"{said[0].upper()}{said[1:]}."
