"""What a node finds about itself: files, room, cores, GPUs and memory; and the facts in which all nodes must agree."""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.loading import dump_config
from configs.memory import GIB
from configs.schema import Config
from configs.this_machine import count_cores
from launch.check.cache import check_cache
from launch.check.memory import LARGE, check_memory
from launch.check.model import Model, check_model, find_local_model
from launch.check.packages import PROJECT, check_packages, installed_versions, project_requirements
from launch.check.paths import check_paths, existing
from launch.check.result import Check, error_of, ok
from launch.check.situation import Situation, load_situation
from launch.command import REPO_ROOT
from launch.gpus import Gpu, list_gpus
from launch.preflight.host_memory import check_host_memory
from launch.preflight.place import Place

# The subjects whose errors are this node's hardware, not the user's input: a run starts again without such a node.
HARDWARE = ("gpus", "driver")


@dataclass(frozen=True)
class NodeReport:
    """checks: what the node finds.  facts: name -> value, to be alike on all nodes.  gpus: that it has."""

    checks: list[Check]
    facts: dict[str, str]
    gpus: int


def look_at_node(config_path: str, overrides: Sequence[str], place: Place) -> NodeReport:
    """Everything that can be looked at without torch; whatever is wrong is a check, nothing is raised."""
    gpus = tuple(list_gpus(os.environ))
    facts = {"Python": platform.python_version(), PROJECT: _own_version(), **_versions()}
    processes = place.processes * place.count
    situation, checks = load_situation(config_path, tuple(overrides), processes, gpus)
    checks += _attempt("packages", lambda: check_packages(situation))
    checks += _check_cores(os.environ)
    if situation is None:
        return NodeReport(checks, facts, len(gpus))
    facts["the config"] = _hash_of(situation.config)
    checks += _attempt("paths", lambda: check_paths(situation))
    checks += _attempt("scratch", lambda: _check_scratch(situation))
    model, found = _find_model(situation)
    checks += found
    if model is not None:
        facts["model.base"] = f"of {model.sizes.shape.parameters:,} parameters"
        checks += _attempt("cache", lambda: _check_shards(situation, model, facts))
        checks += _check_gpus(gpus, place, model.sizes.shape.parameters)
        if gpus:
            sizes = model.sizes
            checks += _attempt("memory", lambda: check_memory(situation, sizes, None, gpu_gib=None, encodes=False))
        host = {"node": place.rank, "nodes": place.count, "processes": place.processes}
        checks += check_host_memory(situation.config, model.sizes, situation.engine, **host)
    else:
        checks += _check_gpus(gpus, place, 0)
    return NodeReport(checks, facts, len(gpus))


def _hash_of(config: Config) -> str:
    """Of the config but for data.local_cache, which is each node's own."""
    data = config.data.model_copy(update={"local_cache": None})
    return hashlib.sha256(dump_config(config.model_copy(update={"data": data})).encode()).hexdigest()[:12]


def _attempt(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks; an error where files cannot be read or the input is wrong as a whole."""
    try:
        return list(look())
    except InputError as error:
        return [error_of(name, error)]
    except OSError as error:
        cure = "Change its permissions, or look at the disk that it is on."
        return [Check(name, "error", f"{error.filename}: cannot be read ({error.strerror})", cure)]


def _find_model(situation: Situation) -> tuple[Model | None, list[Check]]:
    folder, check = find_local_model(situation.config.model.base)
    if folder is None:
        return None, [check]
    model, checks = check_model(folder)
    return model, [check, *checks]


def _check_shards(situation: Situation, model: Model, facts: dict[str, str]) -> Iterator[Check]:
    """The finished cache, shard by shard; its manifest is a fact."""
    state, checks = check_cache(situation, model, None)
    yield from checks
    cache = situation.config.data.cache
    if situation.config.data.mode == "cached" and not state.can_be_read:
        if all(check.state != "error" for check in checks):
            cure = f"Run `fluxfill preprocess {situation.config_path}` first, or submit with --with-preprocess."
            yield Check("cache", "error", f"{cache}: no finished cache is there", cure)
    elif isinstance(cache, Path) and state.can_be_read:
        facts["the manifest of data.cache"] = hashlib.sha256((cache / "manifest.json").read_bytes()).hexdigest()[:12]


def _check_scratch(situation: Situation) -> Iterator[Check]:
    """Room for copies of shards on the node's own disk."""
    data = situation.config.data
    if data.local_cache is None:
        return
    if "$" in str(data.local_cache):
        what = f"{data.local_cache}: a variable is not set on this node"
        yield Check("scratch", "error", what, "Correct slurm.scratch, or data.local_cache.")
        return
    free = shutil.disk_usage(existing(data.local_cache)).free / GIB
    what = f"{free:.1f} GiB free for data.local_cache {data.local_cache}, which may take {data.local_cache_gib:g}"
    if free < data.local_cache_gib and not data.local_cache.exists():
        yield Check("scratch", "error", what, "Lower data.local_cache_gib, or point slurm.scratch at a larger disk.")
    else:
        yield ok("scratch", what)


def _check_cores(environ: Mapping[str, str]) -> Iterator[Check]:
    """The cores that this process may run on, against those that SLURM was asked for."""
    have, asked = count_cores(), int(environ.get("SLURM_CPUS_PER_TASK", "0"))
    if have < asked:
        cure = "Give srun --cpus-per-task as well, as it does not inherit sbatch's."
        yield Check("cores", "warning", f"{have} of the {asked} cores that were asked for", cure)
    else:
        yield ok("cores", f"{have}" + (f", and {asked} were asked for" if asked else ""))


def _check_gpus(gpus: Sequence[Gpu], place: Place, parameters: float) -> Iterator[Check]:
    """The GPUs that the driver shows, against those that the job was given.  parameters: of the model."""
    asked = max(place.asked_gpus, place.processes if gpus else 0)
    if len(gpus) < asked and gpus:
        cure = "Exclude the node (slurm.exclude), and tell who runs the cluster."
        yield Check("gpus", "error", f"{len(gpus)} of {asked} GPUs answer", cure)
    elif not gpus and (asked or parameters > LARGE):
        what = f"no NVIDIA driver answers, and {asked or 'no'} GPUs were asked for"
        if parameters > LARGE:
            yield Check("driver", "error", what, "Look at nvidia-smi there; a container needs --nv or its like.")
        else:
            yield Check("driver", "warning", f"{what}: a small model trains on the CPU", "Look at nvidia-smi there.")
    else:
        kinds = ", ".join(sorted({f"{gpu.name}, {gpu.memory_gib:.0f} GiB" for gpu in gpus}))
        yield ok("gpus", f"{len(gpus)} x {kinds}" if gpus else "none")


def _versions() -> dict[str, str]:
    """Of the packages that fluxfill depends on, as far as they are installed."""
    installed = installed_versions()
    direct = {requirement.name for requirement in project_requirements()}
    return {name: installed[name] for name in sorted(direct & installed.keys())}


def _own_version() -> str:
    """The commit, or the version where fluxfill does not run from its repository."""
    command = ["git", "-C", str(REPO_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    return installed_versions().get(PROJECT, "unknown")
