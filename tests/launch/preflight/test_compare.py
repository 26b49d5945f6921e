from collections.abc import Mapping

import pytest

from launch.check.result import Check, ok
from launch.preflight.compare import Finding, absent_nodes, compare_reports, judge_ranks
from launch.preflight.node import NodeReport
from launch.preflight.place import Place

GPUS = Check("gpus", "error", "1 of 2 GPUs answer", "x")
NO_DRIVER = Check("driver", "warning", "no NVIDIA driver answers", "x")


def place(count: int) -> Place:
    return Place(0, count, 2, "h", 1, tuple(f"n{node}" for node in range(count)))


def reports(*checks: list[Check], gpus: int = 2, **facts: str) -> dict[int, NodeReport]:
    return {node: NodeReport(list(found), dict(facts), gpus) for node, found in enumerate(checks)}


def errors(findings: list[Finding]) -> list[tuple[tuple[str, ...], str, bool]]:
    return [(found.nodes, found.check.name, found.hardware) for found in findings if found.check.state == "error"]


def test_what_all_nodes_find_is_told_once_and_what_one_finds_with_its_name() -> None:
    wrong = Check("paths", "error", "run.dir: nothing can be written", "x")
    found = compare_reports(place(2), reports([wrong, ok("cores", "8")], [wrong, ok("cores", "9")]), {})
    assert errors(found) == [((), "paths", False)]
    assert [finding.check.what for finding in found if finding.check.name == "cores"] == ["8"]
    assert errors(compare_reports(place(2), reports([], [wrong]), {})) == [(("n1",), "paths", False)]


@pytest.mark.parametrize(
    "found, expected",
    [
        (reports([], [GPUS]), [(("n1",), "gpus", True)]),
        (reports([GPUS], [GPUS]), [((), "gpus", False)]),  # the job's fault, as all have it
        (reports([GPUS]), [(("n0",), "gpus", True)]),  # of one node alone it cannot be told: another is tried
    ],
)
def test_gpus_that_some_nodes_lack_are_their_hardware(found: dict[int, NodeReport], expected: list) -> None:
    assert errors(compare_reports(place(len(found)), found, {})) == expected


def test_a_node_without_a_driver_is_broken_where_others_have_one() -> None:
    found = reports([], [NO_DRIVER])
    found[1] = NodeReport([NO_DRIVER], {}, 0)
    assert errors(compare_reports(place(2), found, {})) == [(("n1",), "driver", True)]
    none = reports([NO_DRIVER], [NO_DRIVER], gpus=0)
    assert errors(compare_reports(place(2), none, {})) == []


def test_the_few_that_differ_are_named_not_the_many() -> None:
    told = reports([], [], [], torch="2.13.0", commit="a")
    told[1].facts["torch"] = "2.12.0"
    del told[2].facts["commit"]
    found = compare_reports(place(3), told, {})
    assert [(finding.nodes, finding.check.what) for finding in found] == [
        (("n1",), "torch is 2.12.0, elsewhere 2.13.0")
    ], "what a node does not know is told by the check that failed there"


@pytest.mark.fault(19, "a node whose clock is off by seconds or minutes, in preflight")
@pytest.mark.parametrize("ahead, state", [(0.5, "ok"), (10.0, "warning"), (-1000.0, "error")])
def test_a_clock_that_differs_is_named(ahead: float, state: str) -> None:
    found = compare_reports(place(3), reports([], [], []), {0: 0.0, 1: ahead, 2: 0.01})
    [clocks] = [finding for finding in found if finding.check.name == "clocks"]
    assert clocks.check.state == state and clocks.nodes == (() if state == "ok" else ("n1",))


def test_nodes_that_did_not_come_are_named_one_by_one() -> None:
    assert errors(absent_nodes(place(3), {0: None}, "gone")) == [(("n1",), "nodes", True), (("n2",), "nodes", True)]


def rank(number: int, stage: str = "done", **told: object) -> dict:
    figures = {"product_seconds": 0.1, "ring_seconds": 0.1, "all_reduce_seconds": 0.5, "gigabytes_per_second": 3.0}
    return {"rank": number, "stage": stage, "gpu": "H100", **(figures if stage == "done" else {}), **told}


def failed(number: int, stage: str, after: float) -> dict:
    return rank(number, stage, error="boom", failed_after=after)


def judged(*nodes: list[dict]) -> list[Finding]:
    ranks: Mapping[int, list[dict]] = dict(enumerate(nodes))
    return judge_ranks(place(len(nodes)), ranks)


def test_an_all_reduce_that_works_tells_its_rate_and_its_way() -> None:
    [found] = judged([rank(0), rank(1)], [rank(2), rank(3, network="NCCL over IB mlx5_0")])
    assert found.check.what == "64 MiB between 4 ranks in 0.5 s, 3 GB/s; NCCL over IB mlx5_0"


@pytest.mark.parametrize(
    "nodes, named, hardware",
    [
        # One fails at once, and the other runs out of patience waiting for it.
        (([failed(0, "imported", 20)], [failed(1, "imported", 0.1)]), ["n1"], True),
        # One comes less far.
        (([failed(0, "connected", 1)], [failed(1, "connected", 1)], [failed(2, "imported", 9)]), ["n2"], True),
        # One is stopped, and says nothing.
        (([failed(0, "joined", 20)], [rank(1, "joined")]), ["n1"], True),
        # All fail at once: no single node's hardware.
        (([failed(0, "imported", 1)], [failed(1, "imported", 1.5)]), ["n0", "n1"], False),
        # Of one node alone it cannot be told: another is tried.
        (([failed(0, "imported", 1), rank(1)],), ["n0"], True),
    ],
)
def test_the_node_that_broke_the_all_reduce_is_named(nodes: tuple, named: list[str], hardware: bool) -> None:
    found = judged(*nodes)
    assert [node for finding in found for node in finding.nodes] == named
    assert {finding.hardware for finding in found} == {hardware}


def test_imports_that_are_slow_everywhere_end_no_job() -> None:
    [found] = judged([rank(0, "importing")], [rank(1, "importing")])
    assert found.check.state == "warning" and "torch is still being imported everywhere" in found.check.what


def test_one_rank_exchanges_nothing() -> None:
    assert judged([rank(0)]) == []
    assert judged([rank(0, "imported")]) != []


@pytest.mark.fault(16, "a GPU whose matrix product took three times as long in preflight")
def test_a_slow_gpu_is_named() -> None:
    found = judged([rank(0), rank(1)], [rank(2), rank(3, product_seconds=0.3)])
    assert [(finding.nodes, finding.check.what) for finding in found[1:]] == [
        (("n1",), "the GPU of rank 3 takes 3.0 times as long as others")
    ]


def test_a_node_with_slow_links_to_both_sides_is_named_and_its_neighbours_are_not() -> None:
    times = [0.1, 0.1, 0.5, 0.5, 0.5, 0.1, 0.1]
    found = judged(*([rank(node, ring_seconds=seconds)] for node, seconds in enumerate(times)))
    assert [finding.nodes for finding in found[1:]] == [("n3",)]
