import errno
import pickle
from pathlib import Path

import pytest

from configs.errors import InputError, StorageFailed, WhatAndCure, list_problems, os_errors_named


def test_lines_of_a_message_keep_their_parts():
    error = pickle.loads(pickle.dumps(InputError(WhatAndCure("a. b is 1", "Write 2."), WhatAndCure("c is 3"), "d")))
    assert str(error) == "a. b is 1. Write 2.\nc is 3.\nd"
    assert error.args[0].what == "a. b is 1"


def test_a_long_list_of_problems_ends_with_how_many_more():
    lines = list_problems([f"problem {number}" for number in range(70)]).splitlines()
    assert lines[0] == "problem 0"
    assert lines[-1] == "... and 20 more."
    assert len(lines) == 51


@pytest.mark.parametrize("number, kind", [(errno.EACCES, InputError), (errno.EIO, StorageFailed)])
def test_an_os_error_becomes_a_message_of_whose_fault_it_is(number, kind):
    with pytest.raises(InputError, match=r"^a/b: cannot be removed \(why\)\. Do\.$") as told:  # noqa: SIM117
        with os_errors_named(Path("a/b"), "removed", " Do."):
            raise OSError(number, "why")
    assert type(told.value) is kind


def test_what_is_told_already_stays():
    error = StorageFailed("told")
    with pytest.raises(StorageFailed) as told, os_errors_named(Path("a")):
        raise error
    assert told.value is error
