import pytest

from launch.report.run import RunReader
from launch.report.sessions import count_cost, read_sessions
from tests.launch.report.conftest import BEGIN, PACE


def test_each_start_lasts_until_its_last_sign_and_costs_its_own_gpus(make_run):
    told = RunReader(make_run("a")).read()
    first, second = told["sessions"]
    assert first["begin"] == BEGIN and first["hours"] == pytest.approx(8 * 121 * PACE / 3600)
    assert second["hours"] == pytest.approx(4 * 100 * PACE / 3600)
    assert (first["code"], second["code"]) == (75, None)
    cost = told["cost"]
    assert cost["unit"] == "GPU-hours" and cost["total"] == pytest.approx(first["hours"] + second["hours"])
    assert cost["kept"] == pytest.approx((8 + 4) * 100 * PACE / 3600)
    assert cost["undone"] == pytest.approx(8 * 20 * PACE / 3600)
    assert 0 < cost["waiting"] < cost["kept"]


def test_without_a_record_of_starts_the_hours_are_those_of_steps():
    cost = count_cost([], [{"step": 1, "seconds": 1800.0, "data_wait_seconds": None}], [])
    assert cost == {"unit": "hours of steps", "total": None, "kept": 0.5, "undone": 0.0, "waiting": 0.0}


def test_a_clock_that_went_back_costs_nothing_below_zero():
    starts = [{"time": 1000.0, "step": 0, "processes": 2, "gpus": []}, {"time": 10.0, "step": 5, "processes": 2}]
    sessions = read_sessions(starts, [{"step": 1, "time": 5.0}])
    assert [session.hours >= 0 for session in sessions] == [True, True]


def test_a_start_of_another_version_is_read_as_far_as_it_goes():
    (session,) = read_sessions([{"time": 1.0, "gpus": "H100", "versions": None, "processes": "many", "host": 3}], [])
    assert (session.gpus, session.versions, session.processes, session.host) == ((), {}, 1, "")


def test_an_end_that_a_later_start_without_training_left_is_not_the_session_s():
    starts = [
        {"time": 0.0, "step": 0, "processes": 8, "gpus": ["a"]},
        {"time": 3600.0, "code": 0, "reason": "done", "step": 9},
        {"time": 260000.0, "code": 2, "reason": "data.cache holds others", "step": None},
    ]
    (session,) = read_sessions(starts, [{"time": 3500.0, "step": 9}])
    assert (session.hours, session.code, session.reason, session.end_step) == (8.0, 0, "done", 9)


def test_a_step_costs_the_gpus_of_its_time_wherever_it_is_written():
    starts = [{"time": 0.0, "processes": 1, "gpus": ["a"]}, {"time": 10000.0, "processes": 64, "gpus": ["a"]}]
    lines = [{"time": 10500.0, "seconds": 3600.0}, {"seconds": 3600.0}, {"time": 500.0, "seconds": 3600.0}]
    sessions = read_sessions(starts, lines)
    assert count_cost(sessions, [], lines)["undone"] == 64 + 64 + 1, "without a time it is as the line before"


def test_logs_that_were_set_aside_come_by_their_numbers(make_run):
    run = make_run("a")
    for number in (10, 2):
        (run / f"metrics.{number}.jsonl").write_text(f'{{"step": {number}, "loss": 0.5}}\n')
    assert [curve["x"][0] for curve in RunReader(run).read()["undone"]] == [101, 2, 10]
