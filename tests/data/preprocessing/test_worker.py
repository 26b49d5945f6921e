import pytest

from configs.errors import InputError
from data.preprocessing.worker import which_worker


def array_task(task, first, last, count, step=1):
    names = {"ID": task, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    "tasks",
    [
        [array_task(task, 0, 7, 8) for task in range(8)],
        [array_task(task, 1, 8, 8) for task in range(1, 9)],
        [array_task(task, 0, 14, 8, step=2) for task in range(0, 15, 2)],
        [array_task(task, 10, 31, 8, step=3) for task in range(10, 32, 3)],
    ],
)
def test_the_tasks_of_an_array_count_from_zero_without_a_gap(tasks):
    workers = [which_worker(task) for task in tasks]
    assert [worker.index for worker in workers] == list(range(8))
    assert {worker.count for worker in workers} == {8}


def test_an_array_of_single_numbers_stays_within_its_count():
    assert [which_worker(array_task(task, 1, 7, 3)).index for task in (1, 5, 7)] == [0, 1, 0]


def test_ranks_of_a_launch_are_workers_with_a_device_each():
    environments = [
        {"RANK": str(rank), "WORLD_SIZE": "6", "LOCAL_RANK": str(rank % 3), "LOCAL_WORLD_SIZE": "3"}
        for rank in range(6)
    ]
    workers = [which_worker(environ) for environ in environments]
    assert [(worker.index, worker.count, worker.rank) for worker in workers] == [(rank, 6, rank) for rank in range(6)]
    assert [worker.device_index for worker in workers] == [0, 1, 2, 0, 1, 2]


def test_a_batch_script_is_one_worker_whatever_tasks_it_may_start():
    script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert (which_worker(script).index, which_worker(script).count) == (0, 1)
    task = script | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    worker = which_worker(task)
    assert (worker.index, worker.count, worker.device_index) == (5, 8, 1)


def test_ranks_within_an_array_are_numbered_through():
    found = set()
    for task in range(1, 4):
        for rank in range(2):
            ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "SLURM_PROCID": "0"}
            worker = which_worker(array_task(task, 1, 3, 3) | ranks)
            assert (worker.count, worker.device_index) == (6, rank)
            found.add(worker.index)
    assert found == set(range(6))


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """Stands for SLURM's: `controller(text)` is what it says of every job."""

    def write(text):
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return write


@pytest.mark.parametrize(
    "says, expected",
    [
        ("echo JobId=12 JobName=a", (0, 1)),  # an array's task submitted it
        ("echo JobId=12 ArrayJobId=10 ArrayTaskId=3 JobName=a", (2, 8)),
        ("exit 1", (2, 8)),  # nobody knows better
    ],
)
def test_a_job_submitted_from_an_arrays_task_is_none_itself(says, expected, controller):
    controller(says)
    worker = which_worker(array_task(3, 1, 8, 8) | {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10"})
    assert (worker.index, worker.count) == expected


def test_an_arrays_last_task_has_the_arrays_id(controller):
    controller("echo JobId=10 JobName=a")
    worker = which_worker(array_task(8, 1, 8, 8) | {"SLURM_JOB_ID": "10", "SLURM_ARRAY_JOB_ID": "10"})
    assert (worker.index, worker.count) == (7, 8)


def test_the_command_line_counts_before_the_environment():
    worker = which_worker(array_task(3, 1, 8, 8), worker=1, workers=2)
    assert (worker.index, worker.count, worker.device_index) == (1, 2, 1)
    assert str(worker) == "worker 2 of 2 (--worker)"


def test_a_worker_says_who_told_it():
    assert str(which_worker({})) == "worker 1 of 1 (alone)"
    assert str(which_worker(array_task(3, 1, 8, 8))) == "worker 3 of 8 (SLURM array task 3)"
    ranks = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert str(which_worker(array_task(3, 1, 8, 8) | ranks)) == "worker 10 of 32 (SLURM array task 3, rank 1)"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"worker": 1}, "--worker and --workers belong together: give both"),
        ({"workers": 3}, "--worker and --workers belong together"),
        ({"worker": 3, "workers": 3}, "--worker 3 --workers 3: the worker counts from 0 to 2"),
    ],
)
def test_half_a_number_or_one_too_high_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        which_worker({}, **given)
