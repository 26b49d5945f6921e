import pytest

from configs.errors import InputError
from configs.legacy.read_file import fill_variables, read_old_file
from tests.configs.test_yaml_text import BOMB


def read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_old_file(tmp_path / name)


def test_yaml_is_read_as_ai_toolkit_reads_it(tmp_path):
    text = "lr: 1e-4\nsmall: 5.0E-6\nwhole: 1_000\nquantize: yes\nname: e5\nversion: '1.0'\n"
    assert read(tmp_path, "old.yaml", text) == {
        "lr": 1e-4,
        "small": 5e-6,
        "whole": 1000,
        "quantize": True,
        "name": "e5",
        "version": "1.0",
    }


def test_json_may_hold_comments_and_a_last_comma(tmp_path):
    text = '{\n// one\n"url": "https://a//b", /* two */ "list": [1, 2,],\n}\n'
    for name in ("old.json", "old.jsonc", "old"):
        assert read(tmp_path, name, text) == {"url": "https://a//b", "list": [1, 2]}


def test_toml_is_read(tmp_path):
    assert read(tmp_path, "old.toml", "[training]\nlr = 1e-4\n") == {"training": {"lr": 1e-4}}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("old.yaml", "", "the file is empty"),
        ("old.yaml", "a: 1\nb: [hf_abcdefghijKLMN\n", r"old\.yaml:\d: is not YAML"),
        ("old.yaml", "a: !!python/object:os.system x", r"old\.yaml:1: is not YAML"),
        ("old.yaml", BOMB, r"old\.yaml: more than 100000 values, each alias counted as all that it stands for"),
        ("old.yaml", "a: &a [*a]", r"old\.yaml:1: a value contains itself: remove the alias"),
        ("old.json", '{"a": 1\n "token": "hf_abcdefghijKLMN"}', r"old\.json:2: is not JSON"),
        ("old.toml", 'a = 1\ntoken = "hf_abcdefghijKLMN\n', r"old\.toml:2: is not TOML"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line_and_not_quoted(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, name, text)
    assert "hf_" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_old_file(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_old_file(tmp_path)
    (tmp_path / "old.yaml").write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_old_file(tmp_path / "old.yaml")


def test_variables_are_filled_in_as_text_or_as_the_number_that_they_are(tmp_path):
    tree = {"steps": "${STEPS}", "folder": ["${ROOT}/a", "b"], "lr": "${RATE}", "name": "${NAME}", "on": "${ON}"}
    environment = {"STEPS": "20", "ROOT": "/data", "RATE": "1e-4", "NAME": "a: b", "ON": "true"}
    filled = fill_variables(tree, environment, tmp_path)
    assert filled == {"steps": 20, "folder": ["/data/a", "b"], "lr": 1e-4, "name": "a: b", "on": True}


def test_variables_that_are_not_set_are_named_all_at_once_and_secrets_are_not_asked_for(tmp_path):
    tree = {"a": "${ONE}", "b": ["${TWO}"], "c": "${HF_TOKEN}"}
    with pytest.raises(InputError, match="not set: ONE, TWO"):
        fill_variables(tree, {}, tmp_path)
    assert fill_variables({"c": "${HF_TOKEN}"}, {"HF_TOKEN": "x"}, tmp_path) == {"c": "${HF_TOKEN}"}
