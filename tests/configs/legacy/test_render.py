import json

import pytest

from configs.legacy.draft import Imported
from configs.legacy.render import render_config, render_json
from configs.loading import load_config
from configs.yaml_text import parse_yaml
from tests.configs.legacy.old_files import ALL, import_sample


@pytest.mark.parametrize("name", ALL)
def test_a_rendered_config_says_what_the_translation_says_and_is_valid(name, tmp_path):
    imported = import_sample(name)
    text = render_config(imported, name, "new.yaml")
    document = parse_yaml(text)
    assert document.value == imported.config and not document.problems
    (tmp_path / "new.yaml").write_text(text, encoding="utf-8")
    load_config(tmp_path / "new.yaml")
    assert max(map(len, text.splitlines())) <= 120
    assert all(sentence.split()[-1] in text for sentence in imported.really_did)


def test_every_value_of_a_section_has_its_comment_beside_or_above_it():
    imported = Imported(
        "it",
        "",
        {
            "run": {"name": "no", "dir": "a: b # c"},
            "data": {"datasets": [{"name": "a", "target": None, "tars": ["x"]}]},
        },
        {"run.name": "name", "data.datasets.0.target": "FILL IN: " + "the folder " * 12, "data.datasets.0.name": "id"},
        {"data.datasets.0.target": "the folder"},
        (),
        ("It trained nothing.",),
    )
    text = render_config(imported, "old.yaml", "new.yaml")
    assert parse_yaml(text).value == imported.config
    lines = text.splitlines()
    assert "# FILL IN data.datasets.0.target: the folder" in lines
    assert "  name: no # name" in lines or "  name: 'no' # name" in lines
    assert "    - name: a # id" in lines
    above = lines.index("      target: null")
    assert lines[above - 1].startswith("      # ") and any("# FILL IN: the folder" in line for line in lines[:above])


@pytest.mark.parametrize("name", ALL)
def test_json_holds_all_of_the_translation(name):
    imported = import_sample(name)
    content = json.loads(render_json(imported))
    assert content["config"] == imported.config
    assert [line["key"] for line in content["keys"]] == [line.key for line in imported.lines]
    assert tuple(content["really_did"]) == imported.really_did
