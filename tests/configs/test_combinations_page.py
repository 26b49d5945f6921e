from pathlib import Path

from configs.combinations_page import render_page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_rules_say() -> None:
    page = (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
    assert page == render_page(), "python -m configs.combinations_page > docs/combinations.md"
