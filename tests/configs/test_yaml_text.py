from pathlib import Path

import pytest

from configs.loading import dump_config, load_config
from tests.configs.run_file import VALID, problems_with


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
