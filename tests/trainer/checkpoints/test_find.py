import shutil

import pytest

from configs.errors import InputError
from data.storage.checkpoint_folders import checkpoint_folder, step_of
from trainer.checkpoints import find, folders
from trainer.checkpoints.find import CheckpointDeleted, find_checkpoint, intact_checkpoints, tell_if_deleted
from trainer.checkpoints.folders import save_checkpoint


@pytest.fixture
def run(tmp_path):
    """A run of steps 1 to 4: the third is damaged, the fourth half-written."""
    for step in (1, 2, 3, 4):
        folder = save_checkpoint(tmp_path / "run", step, lambda folder: (folder / "state.json").write_text("{}") and {})
        if step == 3:
            (folder / "state.json").write_text("[]")
    (folder / "COMPLETE").unlink()
    return tmp_path / "run"


def test_a_run_means_its_newest_intact_one_and_a_step_that_one(run, tmp_path):
    assert find_checkpoint(run) == checkpoint_folder(run, 2)
    assert find_checkpoint(run, 1) == checkpoint_folder(run, 1) == find_checkpoint(checkpoint_folder(run, 1))
    copied = tmp_path / "of any name"
    shutil.copytree(checkpoint_folder(run, 1), copied)
    assert find_checkpoint(copied) == copied


@pytest.mark.parametrize(
    "place, step, words",
    [
        ("", 7, "run: has no checkpoint of step 7. There are 1, 2, 3."),
        ("", 3, "step-00000003: state.json does not match its sha256. Take another step."),
        ("", 4, "step-00000004: is half-written, or being written"),
        ("checkpoints/step-00000003", None, "does not match"),
        ("checkpoints/step-00000004", None, "half-written"),
        ("checkpoints/step-00000001", 1, "is no run's folder. Give the run, or leave --step out."),
        ("checkpoints", None, "holds no intact checkpoint. Give a run's folder"),
        ("nowhere", None, "nowhere: there is no such folder"),
    ],
)
def test_what_is_none_is_told(run, place, step, words):
    with pytest.raises(InputError) as told:
        find_checkpoint(run / place, step)
    assert words in str(told.value)


def test_a_run_without_a_whole_one_is_told(run):
    for step in (1, 2, 3):
        shutil.rmtree(checkpoint_folder(run, step))
    with pytest.raises(InputError, match=r"run: has no complete checkpoint yet\.$"):
        find_checkpoint(run)
    with pytest.raises(InputError, match="There are none that is complete"):
        find_checkpoint(run, 1)


def test_of_all_damaged_ones_are_named_and_left_out(run, caplog):
    assert [step_of(folder) for folder in intact_checkpoints(run)] == [1, 2]
    assert "step-00000003: left out, it is damaged (state.json does not match" in caplog.text


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), InputError("config.yaml: there is no such file")])
def test_an_error_after_the_folder_went_says_so(run, error):
    folder = checkpoint_folder(run, 1)
    with pytest.raises(type(error), match=r"gone|no such file") as told, tell_if_deleted(folder):
        raise error
    assert told.value is error  # the checkpoint is there: something else is missing
    shutil.rmtree(folder)
    with pytest.raises(CheckpointDeleted, match=r"step-00000001: was deleted while it was read.*keep_last"):  # noqa: SIM117
        with tell_if_deleted(folder):
            raise error


@pytest.fixture
def deleting(run, monkeypatch):
    """deleting(step): once that checkpoint is read, its run has saved step 5, and deletes the other before a hash is
    compared."""

    def begin(step: int) -> None:
        find_damage = folders.find_damage

        def read(folder):
            if step_of(folder) == step and not checkpoint_folder(run, 5).exists():
                save_checkpoint(run, 5, lambda folder: (folder / "state.json").write_text("{}") and {})
                (folder / "COMPLETE").unlink()
                (folder / "state.json").unlink()
            return find_damage(folder)

        for module in (folders, find):
            monkeypatch.setattr(module, "find_damage", read)

    return begin


def test_the_newest_one_that_the_run_deletes_meanwhile_is_not_damaged_and_the_newer_one_is_taken(run, deleting, caplog):
    deleting(2)
    assert step_of(find_checkpoint(run)) == 5
    assert "step-00000003 is damaged" in caplog.text and "step-00000002" not in caplog.text


def test_one_that_was_asked_for_and_goes_meanwhile_was_deleted_and_is_not_damaged(run, deleting, caplog):
    deleting(1)
    with pytest.raises(CheckpointDeleted, match="step-00000001: was deleted while it was read"):
        find_checkpoint(run, 1)


def test_of_all_one_that_goes_meanwhile_is_told_so(run, deleting, caplog):
    deleting(1)
    assert [step_of(folder) for folder in intact_checkpoints(run)] == [2]
    assert "step-00000001: was deleted while it was read" in caplog.text
