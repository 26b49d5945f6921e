import json

import pytest
from rich.console import Console

from demo.soak_judge import Comparison, Event
from demo.soak_report import Ended, report, tell_start, write_result

EVENTS = [
    Event("run", "ddp", "signal, after 3 steps", 1, 1, 20, 9.0, 0.4, 20, lost=2, wrong=["ended with code 1, not 75"]),
    Event("run", "ddp", "kill -9 all, after 0.50 s", -9, None, 20, 0.5, 0.1, 20),
    Event("run", "ddp", "kill -9 all, after 3 steps", -9, 21, 23, 7.0, 0.1, 20, lost=3),
    Event("run", "ddp", "none", 0, 21, 60, 12.0, 0.2, 60, lost=0),
]


@pytest.fixture
def ended():
    return [
        Ended("run", "undisturbed-ddp", True, Comparison(0.0, "")),
        Ended("other", "undisturbed-ddp", False, Comparison(0.1, "losses are 1.0e-01 apart"), excluded=4, replaced=9),
    ]


def test_the_table_counts_what_is_wrong(capsys, ended):
    assert report(EVENTS, ended, Console(width=140)) == 1
    printed = capsys.readouterr().out
    for words in (
        "signal",
        "ended with code 1, not 75",
        "losses are 1.0e-01 apart",
        "bit-equal",
        "NaN in a batch",
        "row replaced",
    ):
        assert words in printed


@pytest.mark.parametrize("events", [[], EVENTS[-1:]])
def test_a_soak_that_has_disturbed_nothing_is_no_success(capsys, events):
    assert report(events, [], Console(width=140)) == 1
    assert "no fault was inflicted" in capsys.readouterr().out


def test_a_start_is_one_line_and_what_is_wrong_with_it(capsys):
    for event in EVENTS:
        tell_start(event, Console(width=40))
    first, wrong, *others = capsys.readouterr().out.splitlines()
    assert "signal, after 3 steps" in first and "lost 2" in first and "WRONG: ended with code 1, not 75" in wrong
    assert len(others) == 3 and "no step" in others[0] and "steps 21-23" in others[1]


def test_a_soak_is_kept_as_a_line(tmp_path, ended):
    for seed in (1, 2):
        write_result(tmp_path / "results" / "soak.jsonl", EVENTS, ended, seed, 15.04)
    first, second = map(json.loads, (tmp_path / "results" / "soak.jsonl").read_text().splitlines())
    assert (first["seed"], second["seed"], first["minutes"], first["starts"]) == (1, 2, 15.0, 4)
    assert first["faults"] == {"signal": 1, "kill -9 all": 2, "NaN in a batch": 4, "row replaced": 9}
    assert first["lost_by_kills"]["kill -9 all"] == {"3": 1}
    assert first["runs"][0] | {"starts": 4, "kills": 2, "apart": 0.0} == first["runs"][0]
    assert first["wrong"] == ["ended with code 1, not 75"]
