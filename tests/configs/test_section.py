import json

import pytest
from pydantic import Field, ValidationError

from configs.schema import Config
from configs.section import Section
from tests.configs.run_file import smallest, with_key


def test_config_is_frozen() -> None:
    config = Config.model_validate(smallest())
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0


@pytest.mark.parametrize(
    "place", ["pipe:cat x", "http://host/a", "file:///a", "s3://", "https://host/a?key=b", "", 3, None]
)
def test_a_cache_elsewhere_is_refused(place):
    with pytest.raises(ValidationError, match=r"only https://|names no bucket|has a \? or #|must be a path or a URL"):
        Config.model_validate(with_key("data.cache", place))


def test_the_text_below_a_key_is_its_description_in_the_json_schema():
    class Base(Section):
        """A base."""

        old: int = 1
        """Of the base,
        on two lines."""

    class Derived(Base):
        """A section."""

        new_: int = Field(2, alias="new")
        """Under its alias."""
        silent: int = 3

    properties = Derived.model_json_schema()["properties"]
    assert properties["old"]["description"] == "Of the base,\non two lines."
    assert properties["new"]["description"] == "Under its alias."
    assert "description" not in properties["silent"]


HOME_PLACES = [
    ("run.dir", "~/runs"),
    ("model.base", "~/models/fill"),
    ("method.init_from", "~/old"),
    ("data.cache", "~/cache"),
    ("data.local_cache", "~/copies"),
    ("data.datasets.0.target", "~/a"),
    ("data.datasets.0.source", "~/a"),
    ("data.datasets.0.mask", "~/a"),
    ("data.datasets.0.mask", {"folder": "~/a"}),
    ("data.datasets", [{"name": "a", "tars": "~/a.tar"}]),
    ("data.datasets", [{"name": "a", "tars": ["~/a.tar"]}]),
    ("data.datasets", [{"name": "a", "table": "~/a.jsonl"}]),
    ("slurm.venv", "~/venv"),
    ("slurm.scratch", "~/scratch"),
    ("slurm.container", {"runtime": "pyxis", "image": "~/a.sqsh", "mounts": ["~/a:/a"]}),
]


@pytest.mark.parametrize("key, value", HOME_PLACES)
def test_every_place_may_begin_at_home(monkeypatch, tmp_path, key, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = json.dumps(Config.model_validate(with_key(key, value)).model_dump(mode="json"))
    assert saved.count(f'"{tmp_path}/') == json.dumps(value).count('"~/') and '"~' not in saved


def test_every_key_of_a_path_is_among_them():
    """By its type; places that are text are named above by hand."""
    tested = {key.rsplit(".", 1)[-1] for key, _ in HOME_PLACES} | {"folder"}
    sections = {Section}
    while more := {below for section in sections for below in section.__subclasses__()} - sections:
        sections |= more
    fields = [
        item
        for section in sections
        if section.__module__.startswith("configs.")
        for item in section.model_fields.items()
    ]
    found = {name for name, field in fields if "pathlib" in str(field.annotation)}
    assert {"dir", "init_from", "cache", "local_cache", "target", "source", "mask", "folder"} <= found <= tested


def test_a_home_that_nobody_has_is_refused():
    with pytest.raises(ValidationError, match="no such home folder is known"):
        Config.model_validate(with_key("run.dir", "~nobody-of-this-name/runs"))
