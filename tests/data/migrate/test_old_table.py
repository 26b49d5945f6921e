import csv
import json
from pathlib import Path

import pytest

from configs.errors import InputError
from data.migrate.old_table import find_in_table


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize(
    "header",
    [
        ("image", "mask", "conditioning_image", "text"),
        ("target_image_path", "mask_image", "masked_image", "caption"),
        ("Ground_Truth", "mask_path", "image", "prompt"),
        ("output", "mask", "input", "text"),
    ],
)
def test_columns_are_told_by_their_usual_names(tmp_path, header):
    for name in ("a.png", "m.png", "s.png"):
        (tmp_path / name).touch()
    table = write_csv(tmp_path / "list.csv", header, ("a.png", str(tmp_path / "m.png"), ".\\s.png", "a sofa"))
    found = find_in_table(table)
    (triple,) = found.triples
    files = (triple.target, triple.mask, triple.masked)
    assert [file.place for file in files] == [str(tmp_path / name) for name in ("a.png", "m.png", "s.png")]
    assert (triple.name, triple.caption, triple.caption_from) == ("a", "a sofa", "table")


def test_a_target_in_several_rows_makes_as_many_triples(tmp_path):
    table = tmp_path / "list.jsonl"
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    rows = [{"image": "x/a.png", "mask": f"m{number}.png"} for number in range(3)] + [{"image": "y/b.png"}]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = find_in_table(table)
    assert [triple.name for triple in found.triples] == ["x/a", "x/a#2", "x/a#3", "y/b"]
    assert "no path in mask" in str(found.triples[3].problems[0])


def test_rows_that_cannot_be_used_are_named(tmp_path):
    table = tmp_path / "list.jsonl"
    table.write_text('{"image": "a.png"}\n{"mask": "m.png"}\n{"image": "https://host/b.png"}\nno json\n')
    found = find_in_table(table)
    assert [Path(triple.target.place).name for triple in found.triples] == ["a.png"]
    assert [problem.where.partition(", ")[2] for problem in found.problems] == ["line 4", "line 2", "line 3: image"]


def test_what_is_no_table_of_targets_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no column of targets, but a, b\. Call it target"):
        find_in_table(write_csv(tmp_path / "list.csv", ("a", "b"), ("1", "2")))
    with pytest.raises(InputError, match="is no folder, and no table"):
        find_in_table(tmp_path / "a.png")


def test_paths_may_be_relative_and_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("old", "old/x"):
        Path(folder).mkdir()
    write_csv(Path("old/list.csv"), ("image", "mask"), ("x/a.png", "m.png"), (str(tmp_path / "old" / "b.png"), "m.png"))
    found = find_in_table(Path("old/list.csv"))
    assert [triple.name for triple in found.triples] == ["b", "x/a"]
    monkeypatch.chdir(tmp_path / "old")
    assert [triple.name for triple in find_in_table(Path("list.csv")).triples] == ["b", "x/a"]


def test_a_folder_that_is_not_there_is_told_once_and_its_rows_are_left_out(tmp_path):
    rows = [("a.png", "m.png"), ("lost/b.png", "m.png"), ("lost/c.png", "m.png")]
    found = find_in_table(write_csv(tmp_path / "list.csv", ("image", "mask"), *rows))
    assert [triple.name for triple in found.triples] == ["a"]
    (problem,) = found.problems
    assert f"names 2 pictures in {tmp_path / 'lost'}, which is no folder" in str(problem)


def test_a_caption_that_is_no_text_is_a_problem(tmp_path):
    table = tmp_path / "list.jsonl"
    table.write_text('{"image": "a.png", "text": ["a", "sofa"]}\n{"image": "b.png", "text": null}\n')
    first, second = find_in_table(table).triples
    assert (first.caption, second.caption, second.problems) == (None, None, ())
    assert "text is ['a', 'sofa'], no text" in str(first.problems[0])


def test_a_picture_without_a_suffix_is_a_problem_because_folders_do_not_have_it_read(tmp_path):
    rows = [("a.PNG", "m.png"), ("b", "m.png"), ("c.png", "m.tmp")]
    found = find_in_table(write_csv(tmp_path / "list.csv", ("image", "mask"), *rows))
    assert [[Path(problem.where).name for problem in triple.problems] for triple in found.triples] == [
        [],
        ["b"],
        ["m.tmp"],
    ]
