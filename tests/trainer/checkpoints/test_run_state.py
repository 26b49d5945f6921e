import json
from collections.abc import Iterable
from dataclasses import replace

import pytest

from configs.errors import InputError
from data.batches.row_filler import ReplacedRow
from trainer.checkpoints.run_state import RunState, gather_replaced, read_state, write_state
from trainer.training_data import choose_order

REPLACED = tuple(
    ReplacedRow(position, "shards/a.tar", row, row + 1) for position, row in ((3, 0), (5, 1), (8, 0), (9, 4))
)


@pytest.fixture
def state(config, samples) -> RunState:
    return RunState(step=3, batch=3, skips=2, restarts=1, order=choose_order(config, samples), replaced=REPLACED[:2])


def test_what_is_written_is_read_back(state, tmp_path):
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
