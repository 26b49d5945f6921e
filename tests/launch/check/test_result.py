import pytest

from configs.errors import InputError, WhatAndCure
from launch.check.result import Check, error_of


@pytest.mark.parametrize(
    "message, what, cure, found",
    [
        ("a.yaml: is empty. Fill it.", "a.yaml: is empty", "Fill it.", ()),
        ("nothing to do about it", "nothing to do about it", "", ()),
        (
            "made by others:\n  a is 1\n  b is 2\nMake it again.",
            "made by others",
            "Make it again.",
            ("a is 1", "b is 2"),
        ),
        ("gone:\n  a\n  b", "gone", "", ("a", "b")),
    ],
)
def test_a_message_is_taken_apart_into_what_and_what_to_do(message, what, cure, found):
    made = error_of("cache", InputError(message))
    assert (made.state, made.what, made.cure, made.found) == ("error", what, cure, found)


def test_parts_that_are_told_apart_stay_so():
    made = error_of("model", InputError(WhatAndCure("a. b is 1", "Write 2. Or 3.")))
    assert (made.what, made.cure) == ("a. b is 1", "Write 2. Or 3.")


def test_no_secret_is_told():
    made = Check(
        "steps", "error", "at https://me:TOP@host/a", "Set HF_TOKEN=TOP.", ("tars: 's3://b/a.tar?sig=TOP'",)
    ).redacted()
    assert "TOP" not in f"{made.what}{made.cure}{made.found}" and made.what == "at https://host/a"
