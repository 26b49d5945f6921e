from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from configs.loading import dump_config
from launch.check.result import Check
from launch.preflight.node import NodeReport, look_at_node
from launch.preflight.place import Place

if TYPE_CHECKING:
    from data.cache.open_cache import Cache


@pytest.fixture
def look(
    cache: "Cache", demo_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., NodeReport]:
    """look("key=value", ..., gpus=how many nvidia-smi lists, asked=how many the job was given)."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(demo_config(cache.folder, f"run.dir={tmp_path}/runs", "logging.trackers=[]")))

    def report(*overrides: str, gpus: int = 0, asked: int = 0) -> NodeReport:
        lines = "\n".join(f'echo "{gpu}, H100, 81559, 0, 550.1, 9.0, GPU-{gpu}"' for gpu in range(gpus))
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        return look_at_node(str(path), overrides, Place(0, 1, max(gpus, asked, 1), "h", 1, ("n0",), asked))

    return report


def about(report: NodeReport, name: str) -> list[Check]:
    return [check for check in report.checks if check.name == name]


def test_a_fit_node_has_nothing_but_good_to_tell(look: Callable[..., NodeReport]) -> None:
    report = look()
    assert {check.state for check in report.checks} == {"ok"}, report.checks
    assert {"torch", "the config", "the manifest of data.cache", "model.base"} <= report.facts.keys()


@pytest.mark.parametrize(
    "gpus, asked, name, state",
    [(2, 2, "gpus", "ok"), (1, 2, "gpus", "error"), (0, 2, "driver", "warning"), (0, 0, "gpus", "ok")],
)
def test_gpus_are_compared_with_those_that_the_job_was_given(
    gpus: int, asked: int, name: str, state: str, look: Callable[..., NodeReport]
) -> None:
    [check] = [check for check in look(gpus=gpus, asked=asked).checks if check.name in ("gpus", "driver")]
    assert (check.name, check.state) == (name, state)


def test_the_memory_plan_is_held_against_the_gpu_that_is_there(look: Callable[..., NodeReport]) -> None:
    [memory] = about(look(gpus=1, asked=1), "memory")
    assert "of 79.6 GiB by formula" in memory.what


def test_a_cache_that_is_not_there_is_an_error(look: Callable[..., NodeReport], tmp_path: Path) -> None:
    states = [check.state for check in about(look(f"data.cache={tmp_path}/none"), "cache")]
    assert states[-1] == "error"


def test_a_wrong_config_is_told_and_not_raised(look: Callable[..., NodeReport]) -> None:
    [check] = about(look("train.lr=fast"), "config")
    assert check.state == "error" and "train.lr" in check.what


def test_fewer_cores_than_were_asked_for_are_told(
    look: Callable[..., NodeReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "100000")
    [check] = about(look(), "cores")
    assert check.state == "warning" and check.what.endswith("of the 100000 cores that were asked for")


def test_scratch_without_room_is_an_error(look: Callable[..., NodeReport], tmp_path: Path) -> None:
    [check] = about(look(f"data.local_cache={tmp_path}/copies", "data.local_cache_gib=1000000"), "scratch")
    assert check.state == "error" and "which may take 1e+06" in check.what


def test_a_nodes_own_scratch_is_no_difference_between_nodes(look: Callable[..., NodeReport], tmp_path: Path) -> None:
    first, second = (look(f"data.local_cache={tmp_path}/{name}").facts["the config"] for name in "ab")
    assert first == second != look("train.lr=5e-5").facts["the config"]
