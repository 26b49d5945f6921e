import os
from pathlib import Path

import pytest

from configs.supervision import ALREADY_RUNNING, BAD_INPUT, FAILED
from data.storage.checkpoint_folders import newest_step
from launch.slurm.restarts import (
    Decision,
    End,
    JobEvent,
    count_shards,
    count_vain,
    decide,
    end_log,
    newest_shard,
    note_silent_ends,
    read_all_ends,
    read_ends,
    read_job_events,
    write_end,
    write_job_event,
)
from launch.supervise import Outcome

STOPPED, CRASHED = Outcome(75, "stopped", 8), Outcome(1, "boom")


def end(start: int, progress: int, decision: Decision = "restart") -> End:
    return End("12", 0, 1, "boom", start, progress, decision)


@pytest.mark.parametrize(
    "code, decision",
    [(0, "done"), (STOPPED.code, "restart"), (FAILED, "restart"), (BAD_INPUT, "stop"), (ALREADY_RUNNING, "stop")],
)
def test_what_would_end_the_same_way_is_not_started_again(code: int, decision: str) -> None:
    assert decide(Outcome(code, ""), [], start=0, progress=4, max_restarts=3)[0] == decision


@pytest.mark.fault(24, "jobs that end at the same step again and again")
@pytest.mark.parametrize("outcome", [STOPPED, CRASHED])
def test_a_job_stops_after_so_many_restarts_without_progress(outcome: Outcome) -> None:
    ends: list[End] = []
    while (decided := decide(outcome, ends, start=6, progress=6, max_restarts=3))[0] == "restart":
        ends.append(end(6, 6))
    assert len(ends) == 3
    assert "4 starts in a row came no further than 6 (slurm.max_restarts is 3)" in decided[1]


def test_progress_begins_the_count_again() -> None:
    ends = [end(6, 6), end(6, 6), end(6, 9)]
    assert decide(CRASHED, ends, start=9, progress=9, max_restarts=1)[0] == "restart"
    assert decide(CRASHED, [*ends, end(9, 9)], start=9, progress=9, max_restarts=1)[0] == "stop"
    assert decide(CRASHED, [*ends, end(9, 9)], start=9, progress=12, max_restarts=1)[0] == "restart"
    assert decide(CRASHED, [], start=9, progress=9, max_restarts=0)[0] == "stop"


def test_the_log_of_ends_is_read_back_and_survives_half_a_line(tmp_path: Path) -> None:
    log = tmp_path / "slurm" / "train-12.jsonl"
    assert read_ends(log) == []
    write_end(log, end(0, 6))
    with log.open("a", encoding="utf-8") as file:
        file.write('{"job": "12", "resta\n')
    write_end(log, end(6, 6))
    assert [(found.start, found.progress) for found in read_ends(log)] == [(0, 6), (6, 6)]
    assert all(found.time > 0 for found in read_ends(log))


def test_progress_is_the_newest_complete_checkpoint_and_the_finished_shards(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0 and count_shards(tmp_path, 0) == newest_shard(tmp_path) == 0
    for step, complete in ((4, True), (8, True), (12, False)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if complete:
            (folder / "COMPLETE").touch()
    assert newest_step(tmp_path) == 8
    (tmp_path / "checkpoints" / "step-00000008").rename(tmp_path / "checkpoints" / "step-00000008.undone")
    assert newest_step(tmp_path) == 4, "the run went back behind step 8"
    for folder, names in (("shards", ("1.tar", "2.tar", "1.index")), ("index", ("2.index",))):  # of either format
        (tmp_path / folder / "photos").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / "photos" / name).touch()
    assert count_shards(tmp_path, 0) == 2


def test_shards_that_are_encoded_again_in_their_places_are_progress(tmp_path: Path) -> None:
    (tmp_path / "index" / "photos").mkdir(parents=True)
    indexes = [tmp_path / "index" / "photos" / f"64x64-{number:06}.index" for number in range(3)]
    for number, index in enumerate(indexes):
        index.touch()
        os.utime(index, ns=(number, number + 1))
    since = newest_shard(tmp_path)
    assert count_shards(tmp_path, since) == 0, "of the job's own there is none"
    ends: list[End] = []
    for number, index in enumerate(indexes):  # one a start, then the time limit
        start = count_shards(tmp_path, since)
        os.utime(index, ns=(10 + number, 10 + number))
        progress = count_shards(tmp_path, since)
        decided, why = decide(Outcome(75, "stopped"), ends, start, progress, max_restarts=0, unit=" shards")
        ends.append(end(start, progress, decided))
        assert (decided, why) == ("restart", f"goes on from {number + 1} shards")
    indexes[0].unlink()
    assert count_shards(tmp_path, since) == 2, "no plan names it any more"


def test_a_start_that_left_no_word_counts_and_one_that_was_ended_from_outside_does_not(tmp_path: Path) -> None:
    log = tmp_path / "train-12.jsonl"
    ends = note_silent_ends(log, [end(0, 6)], "12", restarts=3, progress=6)
    assert [(silent.start, silent.progress) for silent in ends[1:]] == [(6, 6), (6, 6)]
    assert count_vain(ends) == 2 and len(read_ends(log)) == 2
    assert count_vain([*ends, end(6, 6, "left")]) == 2
    assert count_vain(note_silent_ends(log, [end(6, 6)], "12", restarts=2, progress=9)) == 0, "it had come further"
    assert note_silent_ends(log, [end(0, 6)], "12", restarts=1, progress=6) == [end(0, 6)]


def test_the_jobs_of_a_run_and_the_ends_of_all_of_them_are_read_back_in_order(tmp_path: Path) -> None:
    assert read_job_events(tmp_path) == [] and read_all_ends(tmp_path) == []
    write_job_event(tmp_path, JobEvent("12", "submitted"))
    write_job_event(tmp_path, JobEvent("12", "started", "n[1-2]", 1))
    assert [(event.what, event.nodes, event.restarts) for event in read_job_events(tmp_path)] == [
        ("submitted", "", 0),
        ("started", "n[1-2]", 1),
    ]
    for job, work, progress in (("13", "train", 6), ("12", "train", 9), ("12", "preprocess", 1)):
        write_end(end_log(tmp_path, work, job), end(0, progress))
    assert [found.progress for found in read_all_ends(tmp_path)] == [6, 9]


def test_a_first_start_that_left_no_word_in_a_run_that_had_come_far_is_no_progress(tmp_path: Path) -> None:
    ends = note_silent_ends(tmp_path / "train-12.jsonl", [], "12", restarts=2, progress=500)
    assert [(silent.start, silent.progress) for silent in ends] == [(500, 500), (500, 500)]
    assert count_vain(ends) == 2
