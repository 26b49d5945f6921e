from pathlib import Path

import pytest

from configs.errors import InputError
from launch.check.result import Check, ok
from launch.preflight.compare import Finding
from launch.preflight.result import Result, conclude, read_result, write_result

INPUT = Finding(Check("cache", "error", "no cache", "x"))
BROKEN = Finding(Check("gpus", "error", "1 of 2 GPUs answer", "x"), ("n1",), hardware=True)
FINE = Finding(ok("cores", "8"))


@pytest.mark.parametrize(
    "findings, code, bad",
    [
        ([FINE], 0, ()),
        ([FINE, Finding(Check("clocks", "warning", "x", "y"), ("n1",))], 0, ()),
        ([BROKEN, FINE], 1, ("n1",)),
        ([INPUT], 2, ()),
        ([BROKEN, INPUT], 2, ("n1",)),  # without that node it would end the same way
    ],
)
def test_only_broken_nodes_are_worth_a_restart(findings: list[Finding], code: int, bad: tuple[str, ...]) -> None:
    result = conclude(findings)
    assert (result.code, result.bad_nodes) == (code, bad)


def test_the_reason_names_the_first_thing_and_how_many_more() -> None:
    assert conclude([BROKEN, INPUT]).reason == "preflight: n1: 1 of 2 GPUs answer (and 1 more)"


def test_a_result_is_read_back_and_none_is_none(tmp_path: Path) -> None:
    file = tmp_path / "slurm" / "preflight.json"
    assert read_result(file) is None
    write_result(file, Result(1, "so", ("n1",)), [BROKEN])
    assert read_result(file) == Result(1, "so", ("n1",))
    file.write_text('{"result": {"code"')
    assert read_result(file) is None


def test_a_folder_that_cannot_be_written_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_result(tmp_path / "file" / "preflight.json", Result(0, ""), [])
