"""The READMEs quote the demo's figures as they were measured."""

import re
from pathlib import Path

import pytest

from benchmarks.demo_run import figures_of
from benchmarks.page import RESULTS, read

ROOT = Path(__file__).resolve().parents[2]


HEADS = {"train": r"48 (?:training crops|个训练裁块)", "holdout": r"48 (?:held-out crops|个留出裁块)"}


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
@pytest.mark.parametrize("split", HEADS)
def test_the_readme_quotes_the_result(page, split):
    found = read(RESULTS / "demo_run.jsonl")[-1][split]
    text = (ROOT / page).read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\|[^|]*{HEADS[split]}[^|]*\|([^|]*)\|$", text, flags=re.MULTILINE)
    said = [float(number) for number in re.findall(r"\d+\.\d+", row)]
    assert said == [found["trained"], found["untrained"], found["ceiling"]]
    assert found["crops"] == 48


def test_the_figures_are_those_of_the_last_validation():
    figures = {"items": 48, "hole_psnr": 24.8149, "hole_psnr_untrained": 11.6, "hole_psnr_ceiling": 24.9}
    found = figures_of({"step": 900, "train": figures, "holdout": figures})
    assert found["holdout"] == {"crops": 48, "untrained": 11.6, "trained": 24.81, "ceiling": 24.9}
