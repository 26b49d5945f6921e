"""All checks, in the order in which they are told; none of them stops those after it."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.progress import Progress

from configs.errors import InputError
from data.samples.plan import PlannedSample
from launch.check.adapter import check_adapter
from launch.check.cache import CacheState, check_cache, has_finished_cache
from launch.check.disk import check_disk
from launch.check.machine import check_gpus, check_processes
from launch.check.memory import LARGE, check_memory
from launch.check.model import Model, Sizes, check_method, check_model, find_local_model, published_sizes
from launch.check.packages import check_packages, check_python
from launch.check.paths import check_paths
from launch.check.pictures import Pictures, check_pictures
from launch.check.result import Check, error_of, ok, skipped
from launch.check.situation import Situation, load_situation
from launch.check.steps import check_steps
from launch.gpus import list_gpus
from launch.preprocess_first import missing_place


@dataclass(frozen=True)
class Request:
    """What the command line asks for.  processes: None: one per GPU.  gpu_gib: memory of the GPU that will train; None:
    that of this machine.  steps: whether two are to be made."""

    config_path: str
    overrides: tuple[str, ...] = ()
    processes: int | None = None
    gpu_gib: float | None = None
    steps: bool = True


def run_checks(request: Request, progress: Progress, tell: Callable[[Check], None]) -> list[Check]:
    """Every check that the config allows; `tell` hears each as soon as it is made."""
    told: list[Check] = []

    def take(checks: Iterable[Check]) -> None:
        for check in checks:
            told.append(check.redacted())
            tell(told[-1])

    gpus = tuple(list_gpus(os.environ))
    situation, checks = load_situation(request.config_path, request.overrides, request.processes, gpus)
    take(checks)
    take([check_python()])
    take(check_packages(situation))
    take(check_gpus(gpus))
    if situation is None:
        take([skipped("all else", "model, pictures, cache, disk, memory and steps: once the config is right")])
        return told
    take(check_processes(situation))
    take(check_paths(situation))
    model, checks = _attempt("model", lambda: _look_at_model(situation), None)
    take(checks)
    if model is not None:
        take(check_adapter(situation))
    pictures, checks = _attempt("pictures", lambda: _look_at_pictures(situation, progress), None)
    take(checks)
    samples = pictures.samples if pictures else None
    cache = CacheState(False, 0)
    if model is None:
        take([skipped("cache", "once the model is there")])
    else:
        cache, checks = _attempt("cache", lambda: check_cache(situation, model, samples), cache)
        take(checks)
    sizes = model.sizes if model else published_sizes(situation.config.model.base)
    if sizes is None:
        take([skipped("memory", "and disk: once the model is there")])
    else:
        take(_check_resources(situation, sizes, samples, cache, request.gpu_gib))
    if request.steps:
        take(_make_steps(situation, model, pictures, cache, told, progress))
    return told


_T = TypeVar("_T")


def _attempt(name: str, look: Callable[[], tuple[_T, list[Check]]], nothing: _T) -> tuple[_T, list[Check]]:
    """What `look` finds; `nothing` and an error where files cannot be read or the input is wrong as a whole."""
    try:
        return look()
    except InputError as error:
        return nothing, [error_of(name, error)]
    except OSError as error:
        cure = "Change its permissions, or look at the disk that it is on."
        return nothing, [Check(name, "error", f"{error.filename}: cannot be read ({error.strerror})", cure)]


def _look_at_model(situation: Situation) -> tuple[Model | None, list[Check]]:
    folder, check = find_local_model(situation.config.model.base)
    if folder is None:
        return None, [check]
    model, checks = check_model(folder)
    return model, [check, *checks]


def _look_at_pictures(situation: Situation, progress: Progress) -> tuple[Pictures | None, list[Check]]:
    """The pictures, unless they are not on this machine and need not be: the cache is finished."""
    config = situation.config
    place = missing_place(config)
    if config.data.mode == "cached" and has_finished_cache(config) and place is not None:
        return None, [ok("pictures", f"not on this machine ({place}); the finished cache is trained on as it is")]
    if not isinstance(config.data.cache, Path):
        return None, [ok("pictures", "not looked at: data.cache is a URL, which is trained on as it is")]
    return check_pictures(situation, progress)


def _check_resources(
    situation: Situation,
    sizes: Sizes,
    samples: Sequence[PlannedSample] | None,
    cache: CacheState,
    gpu_gib: float | None,
) -> list[Check]:
    """What trains, and the disk and memory that it takes."""
    config = situation.config
    is_known, checks = _attempt("method", lambda: (True, [check_method(config, sizes.shape)]), False)
    if is_known:
        _, disk = _attempt("disk", lambda: (None, [*check_disk(situation, sizes.shape, cache.bytes_to_encode)]), None)
        encodes = cache.bytes_to_encode > 0 or not (cache.can_be_read or config.data.mode == "online")
        checks += [*disk, *check_memory(situation, sizes, samples, gpu_gib=gpu_gib, encodes=encodes)]
    return checks


_NOT_OF_STEPS = ("disk", "memory", "cache")  # what is wrong with these keeps no two steps from being made


def _make_steps(
    situation: Situation,
    model: Model | None,
    pictures: Pictures | None,
    cache: CacheState,
    told: list[Check],
    progress: Progress,
) -> Iterator[Check]:
    """Two steps, unless something is known already that would end them, or make them take hours."""
    if any(check.state == "error" and check.name not in _NOT_OF_STEPS for check in told) or model is None:
        yield skipped("steps", "not tried before the errors above are mended")
    elif pictures is None and not cache.can_be_read:
        yield skipped("steps", "not tried: there is neither a cache that can be read nor pictures to make one of")
    elif not situation.gpus and model.sizes.shape.parameters > LARGE:
        yield skipped("steps", "not tried without a GPU: run the same command where the GPUs are")
    else:
        yield from check_steps(situation, pictures, progress, cache_can_be_read=cache.can_be_read)
