import io
import json

from rich.console import Console

from launch.check.report import count_states, print_check, render_json
from launch.check.result import Check, ok, skipped

MANY = Check(
    "masks", "error", "12 of the kind", "White marks the hole.", tuple(f"{n}.png: all black" for n in range(12))
)


def printed(check: Check, *, terminal: bool, width: int = 60) -> str:
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=terminal, color_system=None)
    print_check(console, check)
    return console.export_text()


def test_lines_of_all_checks_line_up():
    long = "word " * 40
    for terminal in (True, False):
        starts = {printed(ok(name, long), terminal=terminal).index("word") for name in ("config", "misplaced masks")}
        assert len(starts) == 1
    column = starts.pop()
    wrapped = printed(ok("config", long), terminal=True).rstrip("\n").splitlines()
    assert len(wrapped) > 3 and all(line[:column].strip() == "" for line in wrapped[1:])


def test_in_a_log_a_check_is_one_line_and_its_cure_another():
    lines = printed(Check("disk", "error", "x" * 200, "Free some."), terminal=False).splitlines()
    assert len(lines) == 2 and "x" * 200 in lines[0] and lines[1].strip() == "Free some."


def test_the_first_things_found_are_shown_where_something_is_wrong_and_json_has_all():
    text = printed(MANY, terminal=False)
    assert "9.png" in text and "10.png" not in text and "... and 2 more" in text
    assert "0.png" not in printed(ok("memory", "fits", MANY.found), terminal=False)
    told = json.loads(render_json([MANY, ok("config", "right"), skipped("steps", "not tried")]))
    assert len(told["checks"][0]["found"]) == 12 and (told["errors"], told["warnings"]) == (1, 0)


def test_nothing_of_a_file_moves_the_cursor():
    assert "\x1b" not in printed(Check("names", "error", "a\x1b[2Jb.png: no mask", "Add\x1b it."), terminal=False)


def test_what_is_to_be_mended_is_counted():
    warning = Check("captions", "warning", "few")
    assert count_states([MANY, MANY, MANY, warning, ok("config", "")]) == "3 errors, 1 warning"
    assert count_states([ok("config", ""), skipped("steps", "")]) == "all is right"
