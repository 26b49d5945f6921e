from pathlib import Path

import pytest

from launch.status.tail import parse_object, read_last_lines


def test_the_last_whole_lines_are_read_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_last_lines(log, 3) == []
    log.write_bytes(b'{"n": 1}\n{"n": 2}\nno json\n[4]\n{"n": 3}\n{"n": 4, "lo')
    assert [line["n"] for line in read_last_lines(log, 2)] == [2, 3]
    assert len(read_last_lines(log, 100)) == 3


def test_a_huge_log_is_read_from_its_end_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log.open("wb") as file:
        file.seek(50 << 30)  # a hole, which takes no room
        file.write(b'\n{"n": 1}\n{"n": 2}\n')
    assert [line["n"] for line in read_last_lines(log, 2)] == [1, 2]


@pytest.mark.parametrize("text, value", [('{"a": 1}', {"a": 1}), ('{"a"', None), ("[]", None), (b"\xff", None)])
def test_anything_but_an_object_is_none(text: str, value: dict | None) -> None:
    assert parse_object(text) == value
