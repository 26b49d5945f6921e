import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from launch.status.report import render_json, render_page, render_table
from launch.status.run import read_status


def printed(what: RenderableType, width: int) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(what)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_lines_up_in_a_terminal_and_shows_every_figure(width: int, make_run: Callable[..., Path]) -> None:
    runs = [make_run("a" * 60, checkpoint=25, age=7300), make_run("b", outcome={"code": 0, "reason": "done"})]
    lines = printed(render_table([(read_status(run), ["x"]) for run in runs]), width)
    assert max(map(len, lines)) <= width
    assert "".join(line[: lines[0].index("state")].strip() for line in lines[1:-1]) == "a" * 60
    for name, figure in (("step", "40/4000"), ("loss", "0.500"), ("left", "2.2 h"), ("saved", "2 h"), ("!", "1")):
        end = lines[0].index(name) + len(name)
        assert lines[1][:end].endswith(figure), f"{name} is right-aligned under its head"


def test_the_page_says_why_and_what_is_worrying(make_run: Callable[..., Path]) -> None:
    status = read_status(make_run("a", outcome={"code": 1, "reason": "rank 2: boom\x1b[2J", "step": 40}))
    text = "\n".join(printed(render_page(status, ["the disk is nearly full"]), 80))
    assert "failed" in text and "rank 2: boom" in text and "warning  " in text and "the disk is nearly full" in text
    assert "\x1b[2J" not in text, "what a run wrote moves no cursor"


def test_json_has_every_field_and_the_warnings(make_run: Callable[..., Path]) -> None:
    [told] = json.loads(render_json([(read_status(make_run("a", checkpoint=25)), ["x"])]))
    assert (told["name"], told["step"], told["checkpoint"]["step"], told["warnings"]) == ("a", 40, 25, ["x"])
