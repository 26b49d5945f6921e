import io

import pytest
from rich.console import Console

from configs.errors import InputError, StorageFailed
from data.sources.problems import (
    CAPTIONS,
    KINDS,
    MASKS,
    NAMES,
    UNREADABLE,
    Findings,
    Problem,
    ProblemsFound,
    print_found,
)


def printed(problems, width=80, *, terminal=True):
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=terminal, color_system=None)
    print_found(console, ProblemsFound(problems))
    return console.export_text()


def found(cache, *, problems=(), notes=()):
    findings = Findings()
    for problem in problems:
        findings.add(*problem)
    for note in notes:
        findings.note(*note)
    with pytest.raises(ProblemsFound) as caught:
        findings.report(Console(quiet=True), cache)
    return caught.value


def test_problems_stand_in_the_order_of_their_kinds_each_once(tmp_path):
    mask, name = (
        Problem(MASKS, "/a/m.png", "is black", "Mend it."),
        Problem(NAMES, "/a/n.png", "has no mask", "Add it."),
    )
    error = found(tmp_path, problems=[mask, name, mask])
    assert error.problems == [name, mask]
    assert str(error) == "/a/n.png: has no mask. Add it.\n/a/m.png: is black. Mend it."


def test_a_message_becomes_a_problem_of_three_parts():
    error = InputError("/a/b.png: not a readable picture (no. 7). Replace or remove the file.")
    problem = Problem.of(error, UNREADABLE, "/a/b.png")
    assert problem == (UNREADABLE, "/a/b.png", "not a readable picture (no. 7)", "Replace or remove the file.")
    assert str(problem) == str(error)


def test_what_an_error_carries_is_gathered_and_a_storage_that_fails_ends_all():
    findings = Findings()
    one, other = Problem(MASKS, "m", "is black", "Mend it."), Problem(NAMES, "n", "has no mask", "Add it.")
    findings.add_error(ProblemsFound([one, other]), UNREADABLE)
    assert findings.problems == [other, one]
    with pytest.raises(StorageFailed):
        findings.add_error(StorageFailed("the disk is away"), UNREADABLE)


def test_notes_alone_are_printed_and_stop_nothing(tmp_path):
    findings, console = Findings(), Console(file=io.StringIO(), record=True)
    for number in range(25):
        findings.note(CAPTIONS, f"{number}.txt", "goes with no picture", "Remove it.")
    findings.report(console, tmp_path)
    text = console.export_text()
    assert "25 notes (no problem):\ncaptions, 25:\n  0.txt: goes with no picture. Remove it.\n" in text
    assert f"All are listed in {tmp_path / 'problems.txt'}." in text.replace("\n", " ")


def test_a_long_list_is_counted_and_stands_in_a_file_until_the_next(tmp_path):
    many = [Problem(NAMES, f"/a/{number:02d}.png", "has no mask", "Add it.") for number in range(25)]
    error = found(tmp_path, problems=many, notes=[Problem(CAPTIONS, "x.txt", "goes with no picture", "Remove it.")])
    assert "and 15 more of the kind names" in str(error) and str(tmp_path / "problems.txt") in str(error)
    lines = (tmp_path / "problems.txt").read_text().splitlines()
    assert len(lines) == 26 and all(any(f"/{number:02d}.png" in line for line in lines) for number in range(25))
    found(tmp_path, problems=many[:1])
    assert not (tmp_path / "problems.txt").exists()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_counts_a_kind_and_says_its_cure_once(width):
    table = printed(
        [Problem(NAMES, f"/data/set/{number}.png", "has no mask", "Add it.") for number in range(12)]
        + [Problem(kind, "/data/set/deep/m.png", "is bad", "Mend it.") for kind in KINDS if kind != NAMES],
        width,
    )
    assert table.count("Add it.") == 1 and "and 2 more" in table and "all below /data/set" in table
    assert all(kind.split()[0] in table for kind in KINDS)
    assert max(map(len, table.splitlines())) <= width


def test_names_of_users_are_shown_as_they_are_and_move_no_cursor():
    table = printed([Problem(NAMES, "/a/[red]x\x1b[2J\udcff.png", "has [bold]no[/] mask", "Add it.")], 120)
    assert r"[red]x\x1b[2J\udcff.png" in table and "[bold]no[/]" in table
    assert "\x1b" not in table


def test_a_log_has_a_line_for_each_that_a_search_finds():
    problems = [Problem(NAMES, f"/a/{'deep/' * 30}{number}.png", "has no mask", "Add it.") for number in range(2)]
    assert printed(problems, terminal=False).splitlines() == [
        "2 problems:",
        "names, 2:",
        *(f"  {problem}" for problem in problems),
    ]
