"""`make bench`: results are replaced by whole ones alone."""

import pytest

from benchmarks import page, run
from benchmarks.run import Benchmark

PROGRAM = """
import argparse, sys
parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--fail", action="store_true")
options = parser.parse_args()
with open(options.out, "a") as file:
    file.write('{"benchmark": "small"}\\n')
sys.exit("it broke" if options.fail else 0)
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of results of a project with one benchmark, small, which was run before."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "small.py").write_text(PROGRAM)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.jsonl").write_text("earlier\n")
    return tmp_path / "results"


def test_results_of_an_earlier_run_are_replaced(results, capsys):
    assert run.run(Benchmark("small"), results)
    assert (results / "small.jsonl").read_text() == '{"benchmark": "small"}\n'
    assert "1 result(s)" in capsys.readouterr().out


def test_one_that_goes_on_keeps_its_earlier_results(results):
    assert run.run(Benchmark("small", appends=True), results)
    assert (results / "small.jsonl").read_text() == 'earlier\n{"benchmark": "small"}\n'


def test_one_that_fails_keeps_its_earlier_results_and_says_why(results, capsys):
    assert not run.run(Benchmark("small", ((), ("--fail",))), results)
    assert (results / "small.jsonl").read_text() == "earlier\n"
    assert "it broke" in capsys.readouterr().out


def test_one_that_does_not_suit_the_machine_is_left_out_and_is_no_failure(results, capsys):
    assert run.run(Benchmark("small", lacks=lambda: "no GPU"), results)
    assert run.run(Benchmark("absent"), results)
    assert "left out: no GPU" in capsys.readouterr().out
    assert (results / "small.jsonl").read_text() == "earlier\n"


def test_a_name_that_is_none_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    with pytest.raises(SystemExit):
        run.main(["overhaed"])
    assert "no benchmark is called overhaed" in capsys.readouterr().err
