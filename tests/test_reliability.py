"""docs/reliability.md: every row of the fault matrix is injected by a test or says why not, and the page is theirs."""

import json
import subprocess
import sys
import textwrap

from tests.fault_matrix import (
    KINDS,
    NOT_RUN,
    PAGE,
    ROOT,
    ROWS,
    Fault,
    Mark,
    read_day,
    read_marks,
    read_page,
    render_page,
    render_soaks,
)


def test_every_fault_is_injected_by_a_test_or_says_why_not():
    injected = {mark.row for mark in read_marks()}
    assert injected <= ROWS.keys()
    assert [row for row, fault in ROWS.items() if row not in injected and not fault.why_not] == []


def test_every_row_is_of_one_kind():
    assert sorted(row for rows in KINDS.values() for row in rows) == sorted(ROWS)


def test_the_page_says_what_the_marked_tests_did():
    """If not: python -m tests.fault_matrix PATH-OF-THE-TEST"""
    marks, happened = read_marks(), read_page()
    assert PAGE.read_text(encoding="utf-8") == render_page(marks, happened, read_day())
    assert [mark.test for mark in marks if not happened.get(mark.test, NOT_RUN).startswith("passed")] == []


def test_what_happened_is_read_back_from_the_page(tmp_path):
    marks = [Mark(1, "by hand", "tests/a/test_b.py::test_c"), Mark(1, "a | b", "tests/test_d.py::test_e")]
    happened = {"tests/a/test_b.py::test_c": "passed 3 cases; 2 steps lost", "tests/test_d.py::test_e": "failed"}
    path = tmp_path / "page.md"
    path.write_text(render_page(marks, happened, "2026-11-30"), encoding="utf-8")
    assert read_page(path) == happened and read_day(path) == "2026-11-30"
    assert "2 tests of 30 rows, the last of them run at 2026-11-30 on" in path.read_text(encoding="utf-8")


def test_soaks_that_were_kept_are_on_the_page(tmp_path):
    kept = {
        "seed": 7,
        "minutes": 15.2,
        "starts": 9,
        "faults": {"kill -9 all": 3, "row replaced": 0},
        "lost_by_kills": {"kill -9 all": {"0": 1, "3": 1}, "kill -9 a rank": {"3": 2}},
        "runs": [{"run": "run-01-moved", "apart": 2e-8}, {"run": "run-02-same", "apart": 0.0}],
        "wrong": [],
    }
    (tmp_path / "soak.jsonl").write_text(json.dumps(kept) + "\n")
    *_, line = render_soaks(tmp_path / "soak.jsonl")
    assert line == "| 7 | 15.2 | 9 | 3 kill -9 all | 0: 1, 3: 3 | run-01-moved 2.0e-08, run-02-same 0 | nothing |"


def test_marks_are_read_from_the_text(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        textwrap.dedent(
            """
            @pytest.mark.slow
            @pytest.mark.fault(7, "renamed")
            @pytest.mark.fault(5, "cut")
            def test_b(): pass

            def test_c(): pass
            """
        )
    )
    assert read_marks(tmp_path) == [
        Mark(5, "cut", "tests/test_a.py::test_b"),
        Mark(7, "renamed", "tests/test_a.py::test_b"),
    ]


def test_a_run_tells_of_marked_tests_alone_failures_and_what_they_measured(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        textwrap.dedent(
            """
            import pytest

            @pytest.mark.parametrize("case", [1, 2])
            def test_b(case, record_property):
                record_property("happened", "1 step lost")

            def test_c():
                raise AssertionError

            def test_unmarked():
                raise AssertionError
            """
        )
    )
    script = f"""
        import pytest, sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.fault_matrix import Results
        results = Results({{"tests/test_a.py::test_b", "tests/test_a.py::test_c"}})
        pytest.main(["-q", "-p", "no:cacheprovider", "tests"], plugins=[results])
        print(dict(results.happened()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = {"tests/test_a.py::test_b": "passed 2 cases; 1 step lost", "tests/test_a.py::test_c": "failed"}
    assert done.stdout.splitlines()[-1] == str(expected)


def test_a_row_that_no_test_injects_says_why_on_the_page(monkeypatch):
    monkeypatch.setattr("tests.fault_matrix.ROWS", {1: Fault("a comet", "the run goes on", "None was at hand.")})
    monkeypatch.setattr("tests.fault_matrix.KINDS", {"Sky": (1,)})
    assert "| 1 | a comet | the run goes on | not injected here | None was at hand. |" in render_page([], {}, "")
