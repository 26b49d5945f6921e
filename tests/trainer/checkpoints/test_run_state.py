import json
from collections.abc import Iterable
from dataclasses import replace

import pytest

from configs.errors import InputError
from data.batches.row_filler import ReplacedRow
from data.storage.checkpoint_folders import step_of
from trainer.checkpoints.folders import save_checkpoint
from trainer.checkpoints.run_state import (
    CALM_BATCHES,
    RunState,
    forget_rollbacks,
    gather_replaced,
    good_checkpoints,
    read_rollbacks,
    read_state,
    write_rollbacks,
    write_state,
)
from trainer.engines.base import Update
from trainer.training_data import choose_order

REPLACED = tuple(
    ReplacedRow(position, "shards/a.tar", row, row + 1) for position, row in ((3, 0), (5, 1), (8, 0), (9, 4))
)


@pytest.fixture
def state(config, samples) -> RunState:
    return RunState(step=3, batch=3, skips=2, restarts=1, order=choose_order(config, samples), replaced=REPLACED[:2])


GOOD, BAD = Update(0.5, 1.0, applied=True), Update(float("nan"), 1.0, applied=False)


def test_what_is_written_is_read_back(state, tmp_path):
    state = replace(state, excluded=(1, 7), skipped=(2,), rollbacks=1, lr_scale=0.5, losses=(0.1, 1 / 3))
    write_state(tmp_path, state, {"name": "single"})
    assert json.loads((tmp_path / "state.json").read_text())["version"] == 1
    assert read_state(tmp_path) == (state, {"name": "single"})


def test_another_version_is_refused(state, tmp_path):
    write_state(tmp_path, state, {"name": "single"})
    path = tmp_path / "state.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match=rf"{path}: version 2, but this fluxfill reads .* version 1\. Go on with the"):
        read_state(tmp_path)


class SeveralRanks:
    """An engine and a stream in one: this rank's replaced rows, and what all ranks tell."""

    def __init__(self, *of_each: Iterable[ReplacedRow]) -> None:
        self.of_each = [list(rows) for rows in of_each]
        self.ranks = self

    def replaced(self):
        return self.of_each[0]

    def all_gather(self, mine):
        assert mine == self.of_each[0]
        return self.of_each


def test_replaced_rows_of_all_ranks_are_told_once_and_in_order(config, samples):
    state = RunState(step=3, batch=3, skips=0, restarts=1, order=choose_order(config, samples), replaced=REPLACED[:1])
    ranks = SeveralRanks([REPLACED[0], REPLACED[3]], [REPLACED[0], REPLACED[2]], [REPLACED[0], REPLACED[1]])
    assert gather_replaced(config, ranks, state, ranks) == replace(state, replaced=REPLACED)


def test_ranks_that_together_replaced_too_many_stop_together(config, samples):
    state = RunState(step=3, batch=3, skips=0, restarts=0, order=choose_order(config, samples))
    ranks = SeveralRanks(
        [ReplacedRow(n, "a.tar", n, n + 1) for n in range(9)], [ReplacedRow(50, "b.tar", n, 9) for n in range(8)]
    )
    with pytest.raises(
        InputError, match=r"17 damaged sample\(s\), guard\.max_bad_samples is 16: a\.tar row 0, .*b\.tar row 7"
    ):
        gather_replaced(config, ranks, state, ranks)


# --- skips and rollbacks ----------------------------------------------------------------------------------------------


def test_a_skip_uses_up_its_step_and_its_batch(state):
    state = replace(state, skips=0).after(BAD).after(BAD)
    assert (state.step, state.batch, state.skips, state.skipped) == (5, 5, 2, (3, 4))
    assert (state.after(GOOD).step, state.after(GOOD).skips, state.after(GOOD).skipped) == (6, 0, (3, 4))


def test_the_batch_after_an_update_is_behind_those_that_are_passed_over(state):
    state = state.exclude([3, 4, 6])
    assert [state.after(GOOD).batch, state.after(GOOD).after(BAD).batch] == [6, 8]
    assert state.after(GOOD).after(BAD).skipped == (7,)


def test_a_state_is_good_again_after_some_calm(state):
    state = replace(state, skips=0)
    assert state.is_good
    state, good = state.after(BAD), []
    for _ in range(CALM_BATCHES + 1):
        good.append(state.is_good)
        state = state.after(GOOD)
    assert good == [False] * CALM_BATCHES + [True]


def test_batches_that_were_passed_over_are_no_calm(state):
    state = replace(state, skips=0).exclude([1, 4, 5, 6, 7, 8, 9, 60]).after(BAD)  # batch 3
    good = []
    for _ in range(CALM_BATCHES + 1):
        good.append(state.is_good)
        state = state.after(GOOD)
    assert good == [False] * CALM_BATCHES + [True]


def test_a_state_of_before_skipped_batches_were_kept_is_good_unless_it_skips(state):
    assert not state.is_good and replace(state, skips=0).is_good


def test_good_checkpoints_are_those_of_good_states_and_what_cannot_be_read(state, tmp_path):
    for step, skips in ((1, 0), (2, 1), (3, 0)):
        folder = save_checkpoint(
            tmp_path, step, lambda folder, skips=skips: write_state(folder, replace(state, skips=skips), {}) or {}
        )
    (folder / "state.json").write_text("{")
    folders = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (1, 2, 3)]
    assert [step_of(folder) for folder in good_checkpoints(folders)] == [1, 3]


def test_what_a_rollback_changed_is_known_to_checkpoints_before_it(state, tmp_path):
    assert read_rollbacks(tmp_path, state) == state
    write_rollbacks(tmp_path, replace(state, excluded=(4, 5), rollbacks=2, back_to=2, lr_scale=0.25))
    found = read_rollbacks(tmp_path, state.exclude([9]))
    assert found == replace(state, excluded=(4, 5, 9), rollbacks=2, back_to=2, lr_scale=0.25)
    forget_rollbacks(tmp_path)
    assert read_rollbacks(tmp_path, state) == state
