"""Preflights of several nodes, as processes, with faults planted in one of them."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.ranks import own_port
from configs.loading import dump_config
from launch.preflight.compare import Finding
from launch.preflight.exchange import Connection
from launch.preflight.place import Place
from launch.preflight.result import read_result
from launch.preflight.run import Patience, run_preflight
from tests.launch.preflight.conftest import Node, Told
from tests.patience import PATIENCE

if TYPE_CHECKING:
    from data.cache.open_cache import Cache


@pytest.fixture
def config_file(cache: "Cache", demo_config: Callable, tmp_path: Path) -> Path:
    """A config of the tiny model, whose cache is the folder `cache` where a node stands: here, in `tmp_path`/good."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "cache").symlink_to(cache.folder)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(demo_config(Path("cache"), f"run.dir={tmp_path}/runs", "logging.trackers=[]")))
    return path


def test_fit_nodes_meet_and_nothing_is_wrong(run_nodes: Callable[..., Told], config_file: Path, tmp_path: Path) -> None:
    told = run_nodes(config_file, [Node(tmp_path / "good")] * 2)
    assert told.code == 0, told.output
    assert {line.split("|")[0] for line in told.lines} <= {"ok", "warning"}
    assert "between 2 ranks in" in told.about("all-reduce")[0]
    assert "alike on 2 nodes" in told.about("same")[0]
    assert "2 nodes reach n0, over lo" in told.about("network")[0]
    result = read_result(tmp_path / "preflight.json")
    assert result is not None and (result.code, result.bad_nodes) == (0, ())


def test_all_that_is_wrong_with_a_node_is_told_at_once_and_is_no_reason_to_start_again(
    run_nodes: Callable[..., Told], config_file: Path, tmp_path: Path, cache: "Cache"
) -> None:
    """A shard that is missing, another version of a package, and a clock that is ahead."""
    broken = tmp_path / "broken"
    shutil.copytree(cache.folder, broken / "cache", copy_function=shutil.copy)
    missing = min((broken / "cache" / "shards").rglob("*.tar"))
    missing.unlink()
    (tmp_path / "other" / "safetensors-0.1.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "safetensors-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: safetensors\nVersion: 0.1\n"
    )
    node = Node(broken, {"PYTHONPATH": str(tmp_path / "other")}, ahead=1000)
    told = run_nodes(config_file, [Node(tmp_path / "good"), Node(tmp_path / "good"), node])
    assert told.code == 2, told.output
    errors = [line for line in told.lines if line.startswith("error")]
    assert {line.split("|")[1] for line in errors} == {"n2"}
    [cache_error] = [line for line in told.about("cache") if line.startswith("error")]
    assert missing.name in cache_error
    assert any("safetensors is 0.1" in line for line in told.about("same"))
    assert "the clock is 1,000.0 s ahead of the others'" in told.about("clocks")[0]
    assert "between 3 ranks" in told.about("all-reduce")[0]


def test_a_node_that_never_comes_is_named_in_time(
    run_nodes: Callable[..., Told], config_file: Path, tmp_path: Path
) -> None:
    told = run_nodes(config_file, [Node(tmp_path / "good")], count=2, arrival=6)
    assert told.code == 1, told.output
    assert "error|node 1|nodes|did not come within 6 s: dead, or cut off" in told.lines
    result = read_result(tmp_path / "preflight.json")
    assert result is not None and result.bad_nodes == ("node 1",)


def test_a_node_whose_network_fails_is_named_and_not_those_that_wait_for_it(
    run_nodes: Callable[..., Told], config_file: Path, tmp_path: Path
) -> None:
    cut_off = Node(tmp_path / "good", {"GLOO_SOCKET_IFNAME": "nowhere"})
    told = run_nodes(config_file, [Node(tmp_path / "good"), cut_off], meeting=30)
    assert told.code == 1, told.output
    [line] = told.about("all-reduce")
    assert line.startswith("error|n1|all-reduce|rank 1 came to 'imported'")
    result = read_result(tmp_path / "preflight.json")
    assert result is not None and result.bad_nodes == ("n1",)


def test_nodes_that_are_all_slow_to_look_are_tried_again_and_none_is_excluded(
    run_nodes: Callable[..., Told], config_file: Path, tmp_path: Path
) -> None:
    told = run_nodes(config_file, [Node(tmp_path / "good")], report=0)
    assert told.code == 1, told.output
    assert "error|all|nodes|every node has not looked at its files and GPUs within 0 s" in told.lines
    result = read_result(tmp_path / "preflight.json")
    assert result is not None and (result.code, result.bad_nodes) == (1, ())


def test_a_node_with_another_version_of_fluxfill_lets_nobody_wait_for_ever(config_file: Path, tmp_path: Path) -> None:
    told: list[Finding] = []

    def take_part(port: int) -> object:
        connection = Connection(1, "127.0.0.1", port, PATIENCE, PATIENCE, token="of this job")
        connection.tell("hello", "n1")
        assert connection.tell("report", {"what": "of another version"}) is None
        return connection.tell("ranks", [])

    with own_port() as port, ThreadPoolExecutor(1) as other:
        heard = other.submit(take_part, port)
        place = Place(0, 2, 1, "127.0.0.1", port, ("n0", "n1"), token="of this job")
        patience = Patience(*[PATIENCE] * 5)
        assert run_preflight(str(config_file), [], place, tmp_path / "preflight.json", told.append, patience) == 2
        assert heard.result(PATIENCE) == 2
    assert [finding.check.what.split(" (")[0] for finding in told] == ["the reports cannot be compared"]


def test_the_longest_preflight_takes_less_than_two_minutes() -> None:
    longest = Patience()
    assert longest.arrival < longest.report and longest.meeting < longest.ranks
    assert longest.report + longest.ranks + longest.hearing < 120
    assert longest.report < longest.answer < 120 and longest.ranks + longest.hearing < longest.answer
