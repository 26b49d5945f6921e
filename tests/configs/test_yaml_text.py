from pathlib import Path

import pytest

from configs.loading import dump_config, load_config
from configs.yaml_text import parse_yaml
from tests.configs.run_file import VALID, problems_of, problems_with


@pytest.mark.fault(18, "`1e-4` and its like, which older YAML takes for text")
@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", ".0001", "0.0001", "1.0e-4"])
def test_every_way_to_write_a_number_is_a_number(config_file: Path, text: str) -> None:
    config_file.write_text(VALID.replace("1e-4", text), encoding="utf-8")
    assert load_config(config_file).train.lr == 1e-4
    assert load_config(config_file, [f"train.lr={text}"]).train.lr == 1e-4


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "24:00", "2026-01-31", "1_000", "="])
def test_words_that_older_yaml_rewrote_stay_text(config_file: Path, text: str) -> None:
    assert load_config(config_file, [f"data.captions.trigger={text}"]).data.captions.trigger == text


def test_leading_zero_is_not_octal(config_file: Path) -> None:
    assert load_config(config_file, ["train.global_batch_size=010"]).train.global_batch_size == 10


@pytest.mark.fault(18, "a key given twice")
def test_key_given_twice_names_both_lines(config_file: Path) -> None:
    (problem,) = problems_with(config_file, "  cache: cache\n", "  cache: cache\n  cache: other\n")
    assert problem == f"{config_file}:10: data.cache is given twice, first on line 9: keep one of the two."
    (problem,) = problems_with(config_file, "run: {name: try}", "run: {name: try, name: again}")
    assert problem == f"{config_file}:2: run.name is given twice, on the same line: keep one of the two."


NASTY_TEXTS = [
    "",
    " ",
    "no",
    "~",
    "null",
    "1e-4",
    ".5",
    "010",
    "0o17",
    "1_000",
    "12:30",
    "2026-01-31",
    "a: b",
    "- x",
    "#1",
]
NASTY_TEXTS += ["{", "'", '"', "=", "<<", "!x", "&a", "a\nb", "é 中", "x" * 300]


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_any_text_survives_dump_and_load(config_file: Path, tmp_path: Path, text: str) -> None:
    config = load_config(config_file)
    captions = config.data.captions.model_copy(update={"default": text})
    config = config.model_copy(update={"data": config.data.model_copy(update={"captions": captions})})
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again).data.captions.default == text


# --- aliases ----------------------------------------------------------------------------------------------------------

ALIASES = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10))
BOMB = f"a0: &a0 [1, 2]\n{ALIASES}"  # 774,840,978 values in 300 bytes


@pytest.mark.fault(27, "nine lines of YAML that stand for a billion values, and a thousand aliases that nest")
@pytest.mark.parametrize(
    "text, problem",
    [
        (BOMB, "more than 100000 values, each alias counted"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000)), "more than 100000 values"),
    ],
)
def test_aliases_that_expand_without_end_are_refused_before_they_do(config_file: Path, text: str, problem: str) -> None:
    config_file.write_text(VALID + text, encoding="utf-8")
    (told,) = problems_of(config_file)
    assert told.startswith(f"{config_file}: is not YAML: {problem}")


def test_a_mapping_takes_the_keys_of_another_by_a_merge_key(config_file: Path) -> None:
    """An own key counts before a merged one, and of several mappings the first that has it."""
    second = "{name: b, target: t2, mask: m2}"
    text = VALID.replace("- name: a", "- &first\n      name: a").replace(second, "{<<: *first, name: b}")
    config_file.write_text(text, encoding="utf-8")
    one, other = load_config(config_file).data.datasets
    assert other == one.model_copy(update={"name": "b"})
    value = parse_yaml("a: &a {x: 1}\nb: &b {x: 2, y: {z: 3}}\nc: {<<: [*a, *b], w: 4}").value
    assert value["c"] == {"x": 1, "y": {"z": 3}, "w": 4}
    assert parse_yaml("{'<<': {x: 1}}").value == {"<<": {"x": 1}}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{<<: 1}", "<< is no mapping: give *NAME of an &NAME"),
        ("a: {<<: [{x: 1}, 2]}", "a.<< is no mapping: give *NAME of an &NAME"),
        ("a: {<<: {x: 1}, <<: {y: 1}}", "a.<< is given twice: write one, [*A, *B]"),
        ("a: {<<: {x: 1, x: 2}}", "a.x is given twice, on the same line: keep one of the two"),
    ],
)
def test_a_merge_key_that_means_nothing_is_named(text: str, problem: str) -> None:
    assert problem in [told for _, told in parse_yaml(text).problems]


def test_an_entry_that_only_holds_an_anchor_is_told_where_the_anchor_goes(config_file: Path) -> None:
    text = "x-base: &b {dropout: 0.2}\n" + VALID.replace("cache: cache", "cache: cache\n  captions: {<<: *b}")
    config_file.write_text(text)
    assert problems_of(config_file) == [
        f"{config_file}:1: x-base: there is no such key. Put the anchor on the first entry that uses it."
    ]
    config_file.write_text(text.replace("{<<: *b}", "{dropout: 0.2}"))
    (problem,) = problems_of(config_file)
    assert "Put the anchor" not in problem, "nothing uses it"
    assert parse_yaml("a: &a [1, 2]\nb: {c: *a, d: &d x, e: [*d, y]}").anchors == {("a",), ("b", "d")}


def test_a_merged_key_that_is_wrong_is_named_where_it_stands(config_file: Path) -> None:
    old = "    - {name: b, target: t2, mask: m2}\n"
    (problem,) = problems_with(config_file, old, "    - {<<: {weight: -1}, name: b, target: t2, mask: m2}\n")
    assert problem.startswith(f"{config_file}:14: data.datasets.1.weight is -1, but must be a number above 0")
