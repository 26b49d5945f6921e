"""Where a dataset's pictures and masks come from: mixtures that mean nothing are refused with what is meant."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.loading import load_config

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def load(**dataset: Any) -> DatasetConfig:
    return load_config(DEMO, [f"data.datasets=[{json.dumps({'name': 'a'} | dataset)}]"]).data.datasets[0]


RANDOM = {"random": {"brush": 0.6, "box": 0.4}, "variants": 4}


@pytest.mark.parametrize(
    "dataset",
    [
        {"target": "t", "mask": "m"},
        {"target": "t", "mask": "m", "source": "s", "flip": True},
        {"target": "t", "mask": RANDOM},
        {"target": "t", "mask": {"folder": "m", "dilate": [0, 24], "variants": 4}, "source": "s"},
        {"target": "t", "mask": {"folder": "m"}},
        {"tars": "s3://bucket/a-{000..127}.tar"},
        {"tars": ["a.tar", "https://host/b.tar"], "members": {"target": "jpg", "mask": ["m.png", "m.webp"]}},
        {"tars": "a.tar", "members": {"source": "before.jpg"}, "mask": {"dilate": [4, 4]}},
        {"tars": "a.tar", "mask": RANDOM, "members": {"target": "png", "caption": "json"}},
        {"table": "a.jsonl", "columns": {"target": "after", "mask": "hole", "source": "before", "name": "id"}},
        {"table": "gs://bucket/a.parquet", "mask": RANDOM},
    ],
)
def test_what_means_something_is_taken(dataset: dict[str, Any]) -> None:
    found = load(**dataset)
    assert DatasetConfig.model_validate(json.loads(found.model_dump_json())) == found


def test_one_tar_or_suffix_needs_no_list() -> None:
    found = load(tars="a.tar", members={"target": "jpg"})
    assert found.tars == ["a.tar"] and found.members.target == ["jpg"]


@pytest.mark.parametrize(
    "dataset, message",
    [
        ({}, r"target is null \(the default\), but must be given: the folder of the pictures, or in its place tars or"),
        ({"target": "t"}, r"mask is null \(the default\), but must be given: the folder of the masks, or \{random: "),
        ({"target": "t", "mask": {}}, r"mask is \{\}, but must be given: the folder of the masks"),
        ({"target": "t", "mask": {"dilate": [0, 4]}}, r"mask is .*, but must be given: the folder of the masks"),
        ({"tars": "a", "table": "b"}, r"table is \"b\", but the pictures come from tars already: make two datasets"),
        ({"tars": "a", "target": "t"}, r"target is \"t\", but the pictures come from tars: say in members\.target"),
        ({"table": "a", "target": "t"}, r"target is \"t\", but the pictures come from a table: say in columns\.target"),
        ({"tars": "a", "mask": "m"}, r"mask is \"m\", but a folder of masks goes .*: say in members\.mask which"),
        ({"table": "a", "mask": {"folder": "m"}}, r"mask is .*, but a folder of masks goes .*: say in columns\.mask"),
        ({"tars": "a", "source": "s"}, r"source is \"s\", but a folder of sources goes .*: say in members\.source"),
        ({"target": "t", "mask": "m", "members": {"target": "x"}}, r"members is .*, but only tars have members"),
        ({"tars": "t", "columns": {"target": "x"}}, r"columns is .*, but only a table has columns: give table"),
        (
            {"tars": "a", "mask": RANDOM, "members": {"mask": "m.png"}},
            r"random holes need no masks: remove members\.mas",
        ),
        ({"target": "t", "mask": RANDOM, "source": "s"}, r"source is \"s\", but random holes do not know where target"),
        (
            {"tars": "a", "mask": RANDOM, "members": {"source": "s"}},
            r"random holes do not know .*: remove members\.sour",
        ),
        (
            {"table": "a", "mask": RANDOM, "columns": {"source": "s"}},
            r"random holes do not know .*: remove columns\.sou",
        ),
        (
            {"target": "t", "mask": RANDOM | {"folder": "m"}},
            r"mask\.folder is \"m\", but random draws holes that need no",
        ),
        (
            {"target": "t", "mask": RANDOM | {"dilate": [1, 2]}},
            r"mask\.dilate is \[1, 2\], but only a dataset's own masks",
        ),
        (
            {"target": "t", "mask": {"folder": "m", "variants": 2}},
            r"mask\.variants is 2, but without random or dilate ",
        ),
        (
            {"target": "t", "mask": {"folder": "m", "dilate": [9, 2]}},
            r"dilate is \[9, 2\], but must be the least and the",
        ),
        (
            {"target": "t", "mask": {"folder": "m", "dilate": [3]}},
            r"dilate is \[3\], but must be the least and the most",
        ),
        ({"target": "t", "mask": {"random": {}}}, r"mask\.random is \{\}, but one of its kinds must be above 0"),
        (
            {"target": "t", "mask": {"random": {"brsh": 1}}},
            r"random\.brsh is 1, but there is no such key\. Did you mean ",
        ),
        ({"target": "t", "mask": {"random": {"box": -1}}}, r"random\.box is -1, but must be a number of at least 0"),
        (
            {"target": "t", "mask": RANDOM | {"variants": 65}},
            r"variants is 65, but must be a whole number from 1 to 64",
        ),
        ({"target": "t", "mask": 3}, r"mask is 3, but must be a path, a section of keys or null"),
        ({"target": "t", "mask": "m", "flip": 1}, r"flip is 1, but must be true or false"),
        ({"tars": []}, r"tars is \[\], but must be text that is not empty, a list of one or more such or null"),
        ({"tars": ["a", "pipe:cat x"]}, r"tars is .*, but of pipe:cat x, only https://, s3://, gs:// are read"),
        ({"table": "file:///a.jsonl"}, r"table is .*, but of file:///a\.jsonl, only https://, s3://, gs:// are read"),
        ({"table": "https://me:secret@host/a.jsonl"}, r"table is .*, but of .*, it holds a user or password"),
        ({"tars": "a", "members": {"target": "JPG"}}, r"members\.target.* is \"JPG\", but must be text that matches"),
    ],
)
def test_what_means_nothing_is_refused_with_what_is_meant(dataset: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(**dataset)
    assert any(re.search(rf"data\.datasets\.0\..*{message}", line) for line in str(caught.value).splitlines())


def test_one_mistake_is_one_line() -> None:
    for dataset in ({"target": "t", "mask": {"random": {"brsh": 1}}}, {"tars": "pipe:x"}, {"target": "", "mask": "m"}):
        with pytest.raises(InputError) as caught:
            load(**dataset)
        assert len(str(caught.value).splitlines()) == 1, str(caught.value)


@pytest.mark.parametrize(
    "dataset",
    [
        {"tars": "https://user:secret@host/a.tar"},
        {"tars": ["https://host/a.tar", "s3://key:sec/secret@bucket/a.tar"]},
        {"tars": "ftp://host/a.tar?token=secret"},
        {"table": "https://user:secret@host/a.jsonl"},
        {"tars": "https://host/a.tar?token=secret", "table": "https://host/a.jsonl?token=secret"},
        {"tars": {"a": ["https://host/a.tar?token=secret"]}},
        {"target": "t", "mask": "m", "tras": "https://host/a.tar?token=secret"},
    ],
)
def test_no_message_holds_a_secret(dataset: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"host|bucket") as caught:
        load(**dataset)
    assert "secret" not in str(caught.value)
