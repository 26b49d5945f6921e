from pathlib import Path

import pytest

from configs.errors import InputError
from data.storage.checkpoint_folders import (
    COMPLETE,
    checkpoint_folder,
    checkpoint_folders,
    complete_checkpoints,
    step_of,
)


def test_checkpoints_are_the_folders_of_that_name_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 5):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    for step in (5, 100_000_000):
        (checkpoint_folder(tmp_path, step) / COMPLETE).touch()
    for name in ("step-2", "step-00000006.undone", "step-00000006.undone1", "step-00000007.staging", "step-0000000x"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / COMPLETE).touch()
    assert [step_of(folder) for folder in checkpoint_folders(tmp_path)] == [5, 99_999_999, 100_000_000]
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == [5, 100_000_000]
    with pytest.raises(InputError, match="not a checkpoint folder"):
        step_of(tmp_path / "checkpoints" / "step-00000006.undone")


def test_a_run_that_has_not_begun_has_none(tmp_path: Path) -> None:
    assert checkpoint_folders(tmp_path / "run") == complete_checkpoints(tmp_path / "run") == []
