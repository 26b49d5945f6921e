"""docs/performance.md is what the results say."""

import json
import shutil

import pytest

from benchmarks import page
from benchmarks.page import ON_CUDA, PAGE, PARTS, RESULTS, render
from benchmarks.run import BENCHMARKS


@pytest.fixture
def results(tmp_path):
    """A copy of the committed results."""
    return shutil.copytree(RESULTS, tmp_path / "results")


def test_the_page_is_what_the_generator_makes_of_the_results():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python benchmarks/page.py"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_was_not_measured_is_said(part, results, tmp_path):
    (results / f"{part.name}.jsonl").unlink(missing_ok=True)
    section = render(results, tmp_path / "none.md").split(f"## {part.title}\n")[1].partition("\n## ")[0]
    assert section.strip().startswith("**Not measured yet**")


def test_without_a_gpus_results_the_page_says_so(results, tmp_path):
    (results / "gpu.jsonl").unlink(missing_ok=True)
    assert "**Nothing has been measured on a GPU yet.**" in render(results, tmp_path / "none.md")


def test_the_section_on_cuda_stands_in_it_as_it_was_written(results, tmp_path):
    section = "## What stays as it is on CUDA\n\nA line | with 1 % of everything.\n"
    (tmp_path / "on_cuda.md").write_text(section, encoding="utf-8")
    assert section in render(results, tmp_path / "on_cuda.md")
    assert not ON_CUDA.exists() or ON_CUDA.read_text(encoding="utf-8").strip() in render()


@pytest.mark.parametrize("name, key", [("overhead", "ratio"), ("guard", "step_seconds"), ("planning", "mib")])
def test_another_result_makes_another_page(results, name, key):
    path = results / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("not measured yet")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    before = render(results)
    lines[-1][key] += 1.0
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    assert render(results) != before


def test_every_part_names_its_conditions(results):
    for part in PARTS:
        if lines := page.read(results / f"{part.name}.jsonl"):
            assert page.conditions(lines) in render(results)


def test_every_benchmark_has_its_place_in_the_page():
    assert {benchmark.name for benchmark in BENCHMARKS} - {"gpu"} <= {part.name for part in PARTS}
