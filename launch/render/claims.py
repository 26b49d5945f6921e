"""PersistentVolumeClaims of pods: read from the command line, and whether they hold what a run needs and leaves.

A container's own filesystem ends with its pod. What lies under no claim is gone when a pod starts again.
"""

import re
from collections.abc import Iterator, Sequence
from os.path import normpath
from pathlib import Path, PurePosixPath

from configs.errors import InputError, list_problems
from configs.schema import Config
from launch.preprocess_first import picture_places

Claims = Sequence[tuple[str, str]]
"""Of each its name, and where it is mounted."""

_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_LONGEST_NAME = 253


def parse_claims(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Claims as they are given, NAME:PATH. Raises InputError that lists all that Kubernetes would refuse."""
    problems = []
    claims: list[tuple[str, str]] = []
    for text in texts:
        name, _, place = text.partition(":")
        place = _normal(place) if place else ""
        if not (name and place.startswith("/")):
            problems.append(f"--claim {text}: write NAME:PATH, such as data:/data.")
        elif not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", name) or len(name) > _LONGEST_NAME:
            problems.append(
                f"--claim {text}: Kubernetes has no claim of such a name: lower case, digits, - and . (RFC 1123), at "
                f"most {_LONGEST_NAME}. `kubectl get pvc` lists those there are."
            )
        elif place == "/":
            problems.append(f"--claim {text}: it would hide all that the image has. Give a folder of its own.")
        elif ":" in place:
            problems.append(f"--claim {text}: Kubernetes allows no colon where a claim is mounted. Write NAME:PATH.")
        elif place == "/dev/shm" or place in [other for _, other in claims]:
            problems.append(f"--claim {text}: something else is mounted there already. Give another path.")
        else:
            claims.append((name, place))
    if problems:
        raise InputError(list_problems(problems))
    return claims


def require_run_on_claim(config: Config, folder: Path, claims: Claims) -> None:
    """Raises InputError where the run's folder, seen from the pods' working directory, lies under no claim."""
    place = _resolve(config.run.folder, folder)
    if _is_held(place, claims):
        return
    elsewhere = f", or point run.dir below one that is mounted: run.dir={claims[0][1]}/runs" if claims else ""
    raise InputError(
        f"run.dir {config.run.dir}: in the pods that is {place.parent}, under no --claim, so a pod that starts again "
        f"has lost the checkpoints. Mount a claim there, such as --claim NAME:{place.parent}{elsewhere}."
    )


def warnings(config: Config, config_path: str, folder: Path, claims: Claims) -> Iterator[str]:
    """A sentence on each place that a run reads and that lies under no claim: the image may have it there."""
    for key, given in _read_places(config, config_path, folder):
        place = _resolve(given, folder)
        if not _is_held(place, claims):
            yield (
                f"warning: {key} {given}: in the pods that is {place}, under no --claim: they find it only if the "
                "image has it there."
            )


def _read_places(config: Config, config_path: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """By their keys the files and folders on disk that a run reads; pictures only where no cache replaces them."""
    yield "config", Path(config_path)
    if isinstance(config.data.cache, Path):
        yield "data.cache", config.data.cache
    if config.data.mode == "online":
        yield from (("data.datasets", place) for place in dict.fromkeys(picture_places(config)))
    base = config.model.base
    if base.startswith((".", "/")) or (folder / base).is_dir():  # else an id on the hub
        yield "model.base", Path(base)
    init_from = getattr(config.method, "init_from", None)
    if init_from is not None:
        yield "method.init_from", init_from


def _resolve(place: Path, folder: Path) -> PurePosixPath:
    return PurePosixPath(_normal(str(folder / place)))


def _normal(place: str) -> str:
    return re.sub("^//+", "/", normpath(place))  # POSIX lets two slashes in front mean another place


def _is_held(place: PurePosixPath, claims: Claims) -> bool:
    return any(place.is_relative_to(mount) for _, mount in claims)
