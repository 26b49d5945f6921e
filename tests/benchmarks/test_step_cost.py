"""The table of two builds' counts, and that the committed one holds what the targets compare."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.step_cost import CASES, ROOT, check_out, run_build, targets

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "step_cost.jsonl"


def committed() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def build(traffic: float, kept: float) -> dict:
    line = {"traffic_gb": traffic, "kept_gib": kept, "peak_above_weights_gib": 2.0}
    return {(name, 3): line | {"traffic_gb": traffic * (2 if "int8" in name else 1)} for name in CASES}


def test_a_ratio_is_of_the_same_case_and_more_is_above_a_plain_lora():
    rows = {what: (before, after, limit) for what, before, after, limit in targets(build(100, 10), build(50, 5))}
    assert rows["lora: traffic, GB"] == (100, 50, 62)
    assert rows["lora int8: traffic above a bf16 lora's, GB"] == (100, 50, 20)
    assert rows["full single: kept above a sharded one's (weight copies), GiB"] == (0, 0, 0)


def test_the_committed_counts_are_of_both_builds_and_of_every_case():
    counted = {(line["build"], line["case"]) for line in committed()}
    assert counted == {(build, case) for build in ("before", "after") for case in CASES}


def test_a_step_takes_no_more_than_it_was_to_come_down_to():
    builds: dict[str, dict] = {"before": {}, "after": {}}
    for line in committed():
        builds[line["build"]][line["case"], line["blocks"]] = line
    for what, _, after, limit in targets(builds["before"], builds["after"]):
        assert after <= limit + 0.05, what


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora, checkpointing", "full single"])
def test_builds_are_counted_as_the_committed_table_says(name):
    """Counts are no timings, and come again: of this build, and of the former one, from before the rooms and by the
    names that it had, where the checkout has that much history."""
    told = {line["build"]: line for line in committed() if line["case"] == name and line["blocks"] == 3}
    _is_counted_as(told["after"], ROOT)
    former = told["before"]["against"]
    if subprocess.run(["git", "-C", ROOT, "cat-file", "-e", former], capture_output=True, check=False).returncode == 0:
        with check_out(former) as tree:
            _is_counted_as(told["before"], tree)


def _is_counted_as(told: dict, tree: Path) -> None:
    counted = run_build(tree, [told["case"]], whole=False)[told["case"], 3]
    for what in ("traffic_gb", "kept_gib", "kernels", "matmul_tflop"):
        assert counted[what] == pytest.approx(told[what], rel=0.01, abs=0.01), (tree, what)
