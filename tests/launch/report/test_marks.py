from launch.report.marks import MOST_MARKS, read_marks
from launch.report.run import RunReader
from launch.report.sessions import read_sessions
from launch.slurm.restarts import End


def test_skips_rollbacks_stops_restarts_and_failures_are_marked_in_the_order_of_time(make_run):
    end = {"code": 1, "reason": "RuntimeError: NCCL died", "step": 200, "again": None}
    marks = RunReader(make_run("a", end=end)).read()["marks"]
    assert [(mark["kind"], mark["step"]) for mark in marks] == [
        *[("skip", 60), ("skip", 61), ("rollback", 61), ("preemption", 120), ("restart", 100), ("failure", 200)]
    ]
    assert "cat" in marks[0]["text"] and "back to step 50" in marks[2]["text"] and "4 x NVIDIA H100" in marks[4]["text"]


def test_a_start_that_left_no_word_before_the_next_is_a_failure():
    sessions = read_sessions([{"time": 1.0, "step": 0}, {"time": 900.0, "step": 5}], [{"step": 6, "time": 700.0}])
    failure, restart = read_marks([], sessions, [])
    assert (failure["kind"], failure["time"]) == ("failure", 700.0) and "no word" in failure["text"]
    assert restart["kind"] == "restart"


def test_what_a_job_tells_is_not_told_twice():
    ends = [End("7", 0, 75, "stopped", 0, 40, "restart", time=100.0), End("7", 1, 1, "lost", 40, 60, "restart", 9000.0)]
    sessions = read_sessions(
        [{"time": 1.0, "step": 0}, {"time": 95.0, "code": 75, "reason": "stopped", "step": 40}], []
    )
    assert [(mark["kind"], mark["step"]) for mark in read_marks([], sessions, ends)] == [
        ("preemption", 40),
        ("failure", 60),
    ]


def test_a_run_without_a_record_of_starts_has_its_resumes():
    events = [{"time": 5.0, "event": "resumed", "step": 6}, {"event": "exported", "step": 9}, {"event": 3}]
    assert [(mark["kind"], mark["step"]) for mark in read_marks(events, [], [])] == [("restart", 6)]


def test_of_thousands_of_skips_the_last_are_marked_and_nothing_else_is_lost():
    skips = [{"time": float(step), "event": "skip", "step": step} for step in range(10 * MOST_MARKS)]
    marks = read_marks([{"time": 0.5, "event": "rollback", "step": 3}, *skips], [], [])
    assert len(marks) == MOST_MARKS + 1 and marks[0]["kind"] == "rollback"
    assert marks[-1]["step"] == 10 * MOST_MARKS - 1
