"""A SLURM of two nodes, and runs of the tiny model that are submitted to it, each looked at by several tests."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.holding import HOLD, go_file
from tests.patience import PATIENCE
from tests.slurm.cluster import Cluster, reason_to_skip, running_cluster
from tests.slurm.jobs import SETTINGS, TWO_RANKS_EACH, Submitted

if TYPE_CHECKING:
    from data.cache.open_cache import Cache


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A SLURM of two idle nodes with 16 CPUs and 8 GPUs each (of the scheduler's alone). Its logs stay where a test
    has failed."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # in TMPDIR a socket's name may be too long
    with running_cluster(folder) as started:
        yield started
    if not request.session.testsfailed:
        shutil.rmtree(folder, ignore_errors=True)  # the last of its processes may be ending


@pytest.fixture(scope="session")
def config_file(cache: "Cache", demo_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of the tiny model over a finished cache, in a folder of its own."""
    from configs.loading import dump_config

    path = tmp_path_factory.mktemp("jobs") / "config.yaml"
    path.write_text(dump_config(demo_config(cache.folder, f"run.dir={path.parent}", *SETTINGS)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fluxfill(cluster: Cluster, config_file: Path) -> Callable[..., str]:
    """What `fluxfill WORD ...` prints, in the config's folder or another."""

    def run(*words: str, folder: Path = config_file.parent) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from launch.cli import main; main()", *words],
            env={**cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def submit(cluster: Cluster, config_file: Path, fluxfill: Callable[..., str]) -> Callable[..., Submitted]:
    """Submits a training job: `submit(name, "key=value", ...)`.

    options: of sbatch's own, with which it is submitted then, and with the variables of another `cluster` if given.
    hold_at: where the job waits until it is released: a step, or the name of a file that it opens.  without: an option
    of the script that is left out, such as --signal.
    """

    def start(
        name: str,
        *overrides: str,
        options: tuple[str, ...] = (),
        hold_at: int | str | None = None,
        without: str | None = None,
        cluster: Cluster = cluster,
    ) -> Submitted:
        folder = config_file.parent
        given = (str(config_file), f"run.name={name}", *overrides)
        if hold_at is not None:
            hold = f'HOLD_AT: "{hold_at}", HOLD_UNTIL: "{go_file(folder / name)}", PYTHONPATH: "{HOLD}"'
            # With LOGLEVEL torch's launcher logs which signal it has heard.
            given = (*given, f"slurm.env={{LOGLEVEL: WARNING, {hold}}}")
        if not options:
            jobs = [line.split()[0] for line in fluxfill("slurm", "submit", *given).splitlines()]
            return Submitted(cluster, folder / name, jobs)
        script = Path(fluxfill("slurm", "render", *given, "--out", str(folder / f"scripts-{name}")).splitlines()[0])
        lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if without is None or not line.startswith(f"#SBATCH {without}")]
        return Submitted(cluster, folder / name, [cluster.submit("".join(kept), *options, folder=folder)])

    return start


@pytest.fixture(scope="session")
def undisturbed(submit: Callable[..., Submitted]) -> Submitted:
    """Two nodes with a rank each, under ddp, from the first step to the last."""
    job = submit("undisturbed")
    assert job.finish() == "COMPLETED", job.log
    return job


@pytest.fixture(scope="session")
def undisturbed_four(submit: Callable[..., Submitted]) -> Submitted:
    """Two nodes with two ranks each."""
    job = submit("undisturbed-four", *TWO_RANKS_EACH)
    assert job.finish() == "COMPLETED", job.log
    return job
