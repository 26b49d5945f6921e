"""Python and the installed packages against the ranges of pyproject.toml, and those that the config alone needs."""

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from configs.combinations import ZERO
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.schema import Config
from configs.urls import is_url
from data.sources.tables import find_tables
from launch.check.result import Check, ok
from launch.check.situation import Situation
from launch.command import REPO_ROOT

PROJECT = "fluxfill"
# Installed with all others, but imported by the runs that name them alone.
_ON_DEMAND = ("deepspeed", "bitsandbytes", "torchao", "tensorboard")
_PYARROW = (".parquet", ".arrow")
_EXTRA = re.compile(r"extra\s*==\s*[\"']([\w-]+)")
_OLDEST_PYTHON = (3, 11)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """Whether this Python is one that fluxfill runs on."""
    found = ".".join(map(str, version))
    if version < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        what = f"Python {found}, but fluxfill needs {oldest} or newer"
        return Check("python", "error", what, "Make the environment with a newer one.")
    return ok("python", f"Python {found} at {sys.prefix}")


def check_packages(situation: Situation | None, installed: Mapping[str, str] | None = None) -> Iterator[Check]:
    """One check for all packages, or one for each that is missing or outside of its range.

    situation: None where there is no valid config: what a config needs alone is left out.  installed: canonical name ->
    version; None: as it is here.
    """
    versions = installed_versions() if installed is None else installed
    needed = {} if situation is None else packages_needed(situation.config, situation.engine)
    wanted = [
        requirement
        for requirement in project_requirements()
        if requirement.name in needed or (requirement.extra == "" and requirement.name not in _ON_DEMAND)
    ]
    wrong = False
    for requirement in {requirement.name: requirement for requirement in wanted}.values():
        name, version = requirement.name, versions.get(requirement.name)
        why = f"{needed[name]} needs it" if name in needed else f"fluxfill needs {name}{requirement.ranges}"
        if version is None:
            extra = requirement.extra
            install = f"{PROJECT}[{extra}]" if extra else f"{name}{requirement.ranges}"
            yield Check("packages", "error", f"{name} is not installed; {why}", f"pip install '{install}'")
            wrong = True
        elif not requirement.ranges.contains(Version(version).public, prereleases=True):
            what = f"{name} {version} is outside of {requirement.ranges}, which fluxfill was made for"
            yield Check("packages", "error", what, f"pip install '{name}{requirement.ranges}'")
            wrong = True
    if not wrong:
        names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", *needed) if name in versions)
        yield ok("packages", f"{len(wanted)} in their ranges; {names}{_untested(versions)}")


def packages_needed(config: Config, engine: str) -> dict[str, str]:
    """Package -> the key of a config that needs it, of those that not every run imports."""
    needed = {}
    if engine in ZERO:
        needed["deepspeed"] = f"parallel.engine {engine}"
    if config.data.encoders.t5_precision == "int8":
        needed["bitsandbytes"] = "data.encoders.t5_precision int8"
    if config.train.optimizer == "adamw8bit":
        needed["bitsandbytes"] = "train.optimizer adamw8bit"
    if config.train.optimizer == "prodigy":
        needed["prodigyopt"] = "train.optimizer prodigy"
    if config.model.precision == "nf4":
        needed["bitsandbytes"] = "model.precision nf4"
    if config.model.precision in ("int8", "fp8"):
        needed["torchao"] = f"model.precision {config.model.precision}"
    if "tensorboard" in config.logging.trackers:
        needed["tensorboard"] = "logging.trackers"
    for key, place in _places(config):
        if place.startswith("s3://"):
            needed["s3fs"] = f"{key} on S3"
        elif place.startswith("gs://"):
            needed["gcsfs"] = f"{key} on Google Cloud Storage"
    for dataset in config.data.datasets:
        if _needs_pyarrow(dataset):
            needed["pyarrow"] = f"the table of dataset {dataset.name} in Parquet or Arrow"
    return needed


def _places(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path or URL) of what may be remote."""
    yield "data.cache", str(config.data.cache)
    for dataset in config.data.datasets:
        if dataset.table is not None:
            yield f"the table of dataset {dataset.name}", dataset.table
        for tar in dataset.tars or []:
            yield f"the tars of dataset {dataset.name}", tar


def _needs_pyarrow(dataset: DatasetConfig) -> bool:
    """Whether its table, or one of the tables of its folder, is of a kind that pyarrow reads."""
    if dataset.table is None:
        return False
    if is_url(dataset.table):
        return dataset.table.partition("?")[0].endswith(_PYARROW)
    try:
        return any(table.endswith(_PYARROW) for table in find_tables(dataset.table, dataset.name))
    except InputError:  # which the check of the pictures tells
        return dataset.table.endswith(_PYARROW)


@dataclass(frozen=True)
class ProjectRequirement:
    """A package that fluxfill depends on.  name: canonical.  extra: of fluxfill that it belongs to, "" if to none."""

    name: str
    ranges: SpecifierSet
    extra: str


def project_requirements() -> list[ProjectRequirement]:
    """What fluxfill depends on here: by pyproject.toml where it runs from its repository, which may have changed since
    it was installed, else as it was installed. Those of the extra `dev` repeat others and are left out."""
    path = REPO_ROOT / "pyproject.toml"
    lines: list[tuple[str, str]] = []
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        lines += [(line, "") for line in project["dependencies"]]
        lines += [(line, extra) for extra, of_it in project["optional-dependencies"].items() for line in of_it]
    else:
        for line in importlib.metadata.requires(PROJECT) or []:
            extra = _EXTRA.search(line)
            lines.append((line, extra[1] if extra else ""))
    requirements = [(Requirement(line), extra) for line, extra in lines if extra != "dev"]
    return [
        ProjectRequirement(canonicalize_name(requirement.name), requirement.specifier, extra)
        for requirement, extra in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    ]


def installed_versions() -> dict[str, str]:
    """Canonical name -> version of every distribution on sys.path; the first of a name is the one imported."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return versions


def _untested(versions: Mapping[str, str]) -> str:
    """Which of the direct dependencies are not at the version that the tests ran with, if any."""
    tested = pinned_versions()
    direct = {requirement.name for requirement in project_requirements()}
    other = [
        f"{name} {versions[name]} (tested: {tested[name]})"
        for name in sorted(direct & versions.keys() & tested.keys())
        if Version(versions[name]).public != Version(tested[name]).public
    ]
    return f"; not as tested: {', '.join(other)}" if other else ""


def pinned_versions() -> dict[str, str]:
    """Canonical name -> version of constraints.txt; empty where fluxfill is installed without its repository."""
    path = REPO_ROOT / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pinned = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.split()[0].rstrip(";") for name, _, version in pinned}
