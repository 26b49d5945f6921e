"""Whose plan a worker goes by. Members of other machines are files, moved there by the test."""

import json
import os
import threading
import time

import pytest

from configs.errors import InputError, StorageFailed
from configs.supervision import BAD_INPUT, FAILED, exit_code
from data.preprocessing.share_plan import agree_on_plan
from data.preprocessing.worker_group import STALE_SECONDS, WorkerGroup, join
from tests.patience import PATIENCE

SETTINGS = {"format": 1}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "crew"


def touch_elsewhere(member, *, seconds_ago):
    """Make a member one of another machine, last heard of so long ago."""
    file = member.folder / "workers" / f"{member.token}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"place": "another machine", "host": "node-7"}))
    os.utime(file, (time.time() - seconds_ago,) * 2)


def agree(group, *, waiting, planned):
    def plan():
        planned.append(group.token)
        return ()

    return agree_on_plan(group, plan, help_planning=lambda: None, waiting=waiting)


def never(for_whom):
    raise AssertionError(f"waits for {for_whom}")


@pytest.mark.parametrize("last_heard", [STALE_SECONDS / 2, 5, 0.5])
@pytest.mark.parametrize("lives", [True, False])
def test_of_a_worker_elsewhere_it_is_waited_to_hear(folder, last_heard, lives):
    """It may have been killed before this one came: then pictures may have changed since it planned."""
    other, planned, waited_for = WorkerGroup(folder, SETTINGS), [], []
    agree(other, waiting=never, planned=planned)
    touch_elsewhere(other, seconds_ago=last_heard)
    with join(folder, SETTINGS) as group:

        def wait(for_whom):
            waited_for.append(for_whom)
            assert planned == [other.token]
            touch_elsewhere(other, seconds_ago=-0.1 if lives else STALE_SECONDS + 1)

        agree(group, waiting=wait, planned=planned)
        assert planned == ([other.token] if lives else [other.token, group.token])
        assert [line.split(", ")[0] for line in waited_for] == [f"a sign of life of process {os.getpid()} on node-7"]


def test_a_worker_of_this_machine_is_believed_at_once(folder):
    """Whether it lives, the process list tells."""
    planned = []
    with join(folder, SETTINGS) as one:
        agree(one, waiting=never, planned=planned)
        with join(folder, SETTINGS) as other:
            agree(other, waiting=never, planned=planned)
        assert planned == [one.token]


@pytest.mark.parametrize("error, code", [(StorageFailed, FAILED), (InputError, BAD_INPUT)])
def test_what_ends_planning_ends_every_worker_by_the_same_code(folder, error, code):
    """SLURM starts a job again after a server that failed, and not after a picture that is at fault."""
    has_joined, seen = threading.Event(), []

    def plan():
        assert has_joined.wait(PATIENCE)
        time.sleep(0.02)  # clocks of files tick in milliseconds
        raise error("https://host/a.jpg: failed 8 times\nat last with a timeout")

    def work(make_plan, waiting):
        try:
            with join(folder, SETTINGS) as group:
                agree_on_plan(group, make_plan, help_planning=has_joined.set, waiting=waiting)
        except InputError as raised:
            seen.append(raised)

    planner = threading.Thread(target=work, args=(plan, never))
    with join(folder, SETTINGS) as watching:
        planner.start()
        while not watching.holder("plan"):
            time.sleep(0.01)
    work(lambda: pytest.fail("it plans too"), lambda for_whom: time.sleep(0.01))
    planner.join()
    assert [exit_code(raised) for raised in seen] == [code, code]
    assert {str(raised) for raised in seen} == {"https://host/a.jpg: failed 8 times\nat last with a timeout"}
