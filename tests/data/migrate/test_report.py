import json
from dataclasses import replace

import pytest

from configs.errors import InputError
from data.migrate.report import HoleColour, MaskedKinds, MigrationReport, from_json, read_report, to_json, write_report
from data.sources.problems import Problem
from tests.data.migrate.test_datasets import triple


def report_of(tmp_path):
    problem = Problem("masks", "m.png", "is no mask", "Draw one.")
    bad = replace(triple("b", kept=False), problems=(problem,), hole_share=None)
    return MigrationReport(
        folders={"target": "/old/t"},
        out=str(tmp_path),
        how="copy",
        dry_run=False,
        hole=HoleColour("black", "seen", 1, 9),
        masked=MaskedKinds(8, 1, 1),
        triples=(replace(triple("a"), hole_share=0.25), replace(triple("c"), hole_share=1.0), bad),
        problems=(problem,),
        orphans={"/old/m": ["x.png"]},
        repeats={},
        datasets=[{"name": "x", "target": "/new/target", "mask": "/new/mask"}],
        notes=("One.",),
    )


def test_a_report_comes_back_from_its_file(tmp_path):
    report = report_of(tmp_path)
    assert read_report(write_report(report)) == report
    assert json.loads(to_json(report))["counts"]["quarantined"] == 1


def test_a_report_counts_what_is_kept(tmp_path):
    report = report_of(tmp_path)
    assert [each.name for each in report.kept] == ["a", "c"] and len(report.quarantined) == 1
    assert report.hole_histogram == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert str(report.hole) == "black is the hole, seen in 9 of 10 pairs"
    assert "8 of 10 masked pictures are the target with a hole" in str(report.masked)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    with pytest.raises(InputError, match="no report of a migration"):
        from_json(text, "report.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path / "none.json")
