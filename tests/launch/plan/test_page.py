"""docs/planning.md."""

import pytest

from configs.gpu_profiles import gpu_names
from launch.command import REPO_ROOT
from launch.plan.page import render_page


@pytest.fixture(scope="module")
def page() -> str:
    return render_page()


def test_the_page_is_what_the_plans_say_now(page: str) -> None:
    written = (REPO_ROOT / "docs" / "planning.md").read_text()
    assert written == page, "make it again: python -m launch.plan.page > docs/planning.md"


def test_a_card_has_one_row_in_each_table_whatever_profiles_have_its_figures(page: str) -> None:
    rows = [line.split(" | ")[0].strip("| ?") for line in page.splitlines() if line.startswith("| ")]
    same = {"24gb": "rtx3090-24gb", "40gb": "a100-40gb", "80gb": "a100-80gb"}
    assert {name: rows.count(name) for name in gpu_names()} == {
        name: 0 if name in same else page.count("\n### ") for name in gpu_names()
    }
    assert all(f"`{name}` ({card})" in page for name, card in same.items())
