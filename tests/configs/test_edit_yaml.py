import difflib

import pytest

from configs.edit_yaml import append_entry, comments_of, put_datasets, remove, set_nested, set_value
from configs.errors import InputError
from configs.yaml_text import YamlError, parse_yaml

CONFIG = """\
# What the run is for.

---
version: 1   # of the format
run:
    name:   'fill-lora'
model: { base: "black-forest-labs/FLUX.1-Fill-dev", precision: auto }
method: {type: lora, rank: 32,
         alpha: 32}  # on two lines
data:
    cache: &root "/d/cache"
    datasets:
      - name: triples   # ours
        target: triples/target # the picture to learn, its caption beside it as .txt
        mask:   # grown
          folder: "triples/mask" # white: repaint
          label: 1
          dilate: [0, 24]
        flip: true
        # weight: 3

      # From the web.
      - {name: photos, target: 'p', mask: {random: {box: 1.0}}, weight: 2}   # half of the mix

    # Sides of a square.
    resolution: [512, 768, 1024]
    captions:
        default: >-
          a photograph,
          in colour
    # End of data.
logging: {folder: *root}
train:
    lr: 1e-4

# The end."""


def changed_lines(before: str, after: str) -> list[str]:
    """What a diff shows, without its heads."""
    lines = difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True))
    return [line.rstrip("\r\n") for line in lines if line[0] in "+-"]


def value_of(text: str):
    document = parse_yaml(text)
    assert document.problems == []
    return document.value


def test_a_dataset_of_a_new_name_is_appended_and_no_other_byte_changes():
    edited = put_datasets(CONFIG, [{"name": "sofas", "target": "new/target", "mask": "new/mask"}])
    assert changed_lines(CONFIG, edited) == [
        "+       - name: sofas",
        "+         target: new/target",
        "+         mask: new/mask",
    ]
    assert "half of the mix\n      - name: sofas" in edited
    assert value_of(edited)["data"]["datasets"][2] == {"name": "sofas", "target": "new/target", "mask": "new/mask"}


def test_a_dataset_of_a_known_name_keeps_what_is_made_of_its_pictures():
    edited = put_datasets(
        CONFIG, [{"name": "triples", "target": "new/target", "source": "new/source", "mask": "new/mask"}]
    )
    assert changed_lines(CONFIG, edited) == [
        "-         target: triples/target # the picture to learn, its caption beside it as .txt",
        "+         target: new/target # the picture to learn, its caption beside it as .txt",
        '-           folder: "triples/mask" # white: repaint',
        "+           folder: new/mask # white: repaint",
        "-           label: 1",
        "+         source: new/source",
    ]
    assert value_of(edited)["data"]["datasets"][0]["mask"] == {"folder": "new/mask", "dilate": [0, 24]}


def test_a_dataset_inside_brackets_stays_inside_them():
    edited = put_datasets(CONFIG, [{"name": "photos", "table": "a, b/list.jsonl", "columns": {"mask": "hole"}}])
    assert changed_lines(CONFIG, edited) == [
        "-       - {name: photos, target: 'p', mask: {random: {box: 1.0}}, weight: 2}   # half of the mix",
        "+       - {name: photos, weight: 2, table: 'a, b/list.jsonl', columns: {mask: hole}}   # half of the mix",
    ]


def test_datasets_come_in_the_place_of_others():
    entries = [{"name": name, "target": f"new/{name}", "mask": "m"} for name in ("triples", "sofas")]
    edited = put_datasets(CONFIG, entries, instead_of=["triples", "photos", "not there"])
    assert [dataset["name"] for dataset in value_of(edited)["data"]["datasets"]] == ["triples", "sofas"]
    assert value_of(edited)["data"]["datasets"][0]["flip"] is True
    assert "    # Sides of a square.\n" in edited and edited.endswith("\n# The end.")


def test_an_edit_that_changes_nothing_gives_the_same_text():
    entry = {"name": "photos", "target": "p", "mask": {"random": {"box": 1}}}
    assert put_datasets(CONFIG, [entry]) == CONFIG
    edited = put_datasets(CONFIG, [{"name": "sofas", "target": "a", "mask": "b"}])
    assert put_datasets(edited, [{"name": "sofas", "target": "a", "mask": "b"}]) == edited


@pytest.mark.parametrize("value", ["a sofa", "no", "1e-4", "two\nlines", "a: b # c", "'", "é 中", "x" * 300, True, [1]])
def test_any_value_is_set_and_its_surroundings_stay(value):
    edited = set_value(CONFIG, ("data", "captions", "default"), value)
    assert value_of(edited)["data"]["captions"] == {"default": value}
    assert edited.startswith(CONFIG[: CONFIG.index("        default")])
    assert edited.endswith(CONFIG[CONFIG.index("    # End of data.") :])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n# end\n"])
def test_line_ends_and_the_end_of_the_file_stay(newline, ending):
    text = ("data:\n  datasets:\n  - name: a\n    target: b\n    mask: c" + ending).replace("\n", newline)
    for entry in ({"name": "d", "target": "e", "mask": "f"}, {"name": "a", "target": "b", "mask": "c", "source": "g"}):
        edited = put_datasets(text, [entry])
        assert edited.endswith(ending.replace("\n", newline)) and edited.endswith("\n") == text.endswith("\n")
        assert edited.count("\n") - edited.count("\r\n") == (0 if newline == "\r\n" else edited.count("\n"))
        assert entry in value_of(edited)["data"]["datasets"]


@pytest.mark.parametrize(
    "text",
    [
        "data: {datasets: [{name: a, target: &x b, mask: c}, {name: d, target: *x, mask: e}]}",
        "data:\n  datasets:\n  - &all {name: a, target: b, mask: c}\n  other: *all\n",
        "data: {datasets: [&d {name: d, target: e, mask: f, source: g}, {<<: *d, name: a}]}",
    ],
)
def test_values_that_an_alias_shares_are_refused_not_changed(text):
    with pytest.raises(InputError, match=r"data.datasets shares values .* by hand: \[\{name: a, target: new"):
        put_datasets(text, [{"name": "a", "target": "new", "mask": "c"}])


def test_an_alias_is_replaced_where_it_stands():
    text = "data:\n  cache: &root /d\n  datasets:\n  - name: a\n    target: *root # old\n    mask: m\n"
    edited = put_datasets(text, [{"name": "a", "target": "new", "mask": "m"}])
    assert edited == text.replace("*root", "new")


@pytest.mark.parametrize(
    "text, path, expected",
    [
        ("{a: 1, b: 2, c: 3}", ("a",), "{b: 2, c: 3}"),
        ("{a: 1, b: 2, c: 3}", ("b",), "{a: 1, c: 3}"),
        ("{a: 1, b: 2, c: 3}", ("c",), "{a: 1, b: 2}"),
        ("{a: 1}", ("a",), "{}"),
        ("a: 1\n# of b\nb: 2\nc: 3", ("b",), "a: 1\n# of b\nc: 3"),
        ("- a: 1\n  b: 2\n", (0, "a"), "- b: 2\n"),
        ("a:\n  b: 1\n  c: 2 # two\n\nd: 3\n", ("a",), "\nd: 3\n"),
        ("a:\n- b: 1 # one\n  c: 2\n# of d\n- d: 3\n", ("a", 0), "a:\n# of d\n- d: 3\n"),
        ("a:\n  -\n    b: 1\n  - {d: 3}\nc: 4\n", ("a", 0), "a:\n  - {d: 3}\nc: 4\n"),
        ("a:\n  - b: 1\n  - {d: 3}\nc: 4\n", ("a", 1), "a:\n  - b: 1\nc: 4\n"),
        ("a: [{b: 1}, {c: 2}]\n", ("a", 0), "a: [{c: 2}]\n"),
        ("a: [{b: 1}, {c: 2}]\n", ("a", 1), "a: [{b: 1}]\n"),
        ("a: |\n  text\n\nb:\nc: 3\n", ("a",), "\nb:\nc: 3\n"),
        ("a: |\n  text\n\nb:\nc: 3\n", ("b",), "a: |\n  text\n\nc: 3\n"),
    ],
)
def test_a_key_is_removed_with_its_lines_alone(text, path, expected):
    assert remove(text, path) == expected


@pytest.mark.parametrize(
    "text, path, expected",
    [
        ("a:\nb: 2\n", ("a",), "a: x\nb: 2\n"),
        ("a: # why\nb: 2\n", ("a",), "a: x # why\nb: 2\n"),
        ("a:\n  b: 1\n  c: 2 # two\nd: 3\n", ("a",), "a: x # two\nd: 3\n"),
        ("a: 'long' # why\n", ("a",), "a: x # why\n"),
        ("a: >-\n  folded\n  text\n\nb: 2\n", ("a",), "a: x\n\nb: 2\n"),
        ("a: [1,\n  2] # two\n", ("a",), "a: x # two\n"),
        ("a: {b: 1}\n", ("a", "c"), "a: {b: 1, c: x}\n"),
        ("a: {}\n", ("a", "c"), "a: {c: x}\n"),
        ("a:\n  b: 1\n  # c: 5\n# d\n", ("a", "c"), "a:\n  b: 1\n  # c: 5\n  c: x\n# d\n"),
        ("a:\n  b:\n  - 1\n\n# d\nd: 2\n", ("a", "c"), "a:\n  b:\n  - 1\n  c: x\n\n# d\nd: 2\n"),
    ],
)
def test_a_value_is_set_where_it_stands(text, path, expected):
    assert set_value(text, path, "x") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a:\n- b: 1\n\n# next\nc: 2", "a:\n- b: 1\n- b: x\n  d: y\n\n# next\nc: 2"),
        ("a:\n  -   b: 1\nc: 2", "a:\n  -   b: 1\n  -   b: x\n      d: y\nc: 2"),
        ("a: [{b: 1}] # one\n", "a: [{b: 1}, {b: x, d: y}] # one\n"),
        ("a: [{b: 1},\n    {b: 2},\n   ]\n", "a: [{b: 1},\n    {b: 2}, {b: x, d: y},\n   ]\n"),
    ],
)
def test_an_entry_stands_as_those_before_it(text, expected):
    assert append_entry(text, ("a",), {"b": "x", "d": "y"}) == expected


@pytest.mark.parametrize(
    "path, value, lines",
    [
        (("train", "lr"), 5e-5, ["-     lr: 1e-4", "+     lr: 5.0e-05"]),
        (("train", "ema_decay"), None, ["+     ema_decay: null"]),
        (("slurm", "nodes"), 4, ["+ slurm: {nodes: 4}"]),
        (("data", "datasets", 0, "flip"), False, ["-         flip: true", "+         flip: false"]),
        (("data", "resolution", 1), 640, ["-     resolution: [512, 768, 1024]", "+     resolution: [512, 640, 1024]"]),
        (("slurm", "container", "image"), "x", ["+ slurm: {container: {image: x}}"]),
    ],
)
def test_a_nested_key_is_set_with_the_sections_that_it_lacks(path, value, lines):
    edited = set_nested(CONFIG, path, value)
    assert [line for line in changed_lines(CONFIG, edited) if not line.startswith("?")] == lines
    wanted = value_of(edited)
    for step in path:
        wanted = wanted[step]
    assert wanted == value


def test_a_key_of_a_section_that_is_an_alias_is_refused():
    text = "train: &all\n  lr: 1e-4\nflow: *all\n"
    with pytest.raises(YamlError, match="flow stands elsewhere in the file, behind an alias"):
        set_value(text, ("flow", "shift"), 2.0)


def test_random_masks_stay_as_the_config_draws_them():
    new = {"name": "photos", "target": "new", "mask": {"random": {"brush": 0.6}, "variants": 4}}
    (dataset,) = [
        each for each in value_of(put_datasets(CONFIG, [new]))["data"]["datasets"] if each["name"] == "photos"
    ]
    assert (dataset["target"], dataset["mask"]) == ("new", {"random": {"box": 1.0}})


@pytest.mark.parametrize(
    "text, comments",
    [
        ("a: 1\n# one\n# two\nb: 2 # three\n# of c\nc: 3\n", "one two three"),
        ("# of a\na: 1\nb: 2\n", ""),
        ("a: 1 # of a\nb: 2\n", ""),
        ("a: 1\n", ""),
    ],
)
def test_the_comments_of_a_key_are_those_above_it_and_behind_it(text, comments):
    assert comments_of(text, ("b",)) == comments
