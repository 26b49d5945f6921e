from pathlib import Path

from launch.checkpoints import suggest_checkpoint


def test_what_is_no_checkpoint_is_answered_with_the_newest_that_was_meant(tmp_path: Path) -> None:
    """Complete at 20 and 100 000 000, not complete at 300 000 000; a run that went back has set 200 000 000 aside."""
    run = tmp_path / "runs" / "demo"
    checkpoints = run / "checkpoints"
    for name in ("step-00000020", "step-100000000", "step-200000000.undone"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "COMPLETE").touch()
    (checkpoints / "step-300000000").mkdir()
    assert suggest_checkpoint(checkpoints / "step-00000020") is None
    for folder in (run, checkpoints, checkpoints / "step-300000000"):
        assert suggest_checkpoint(folder) == str(checkpoints / "step-100000000")
    assert suggest_checkpoint(run.parent) == "runs/NAME/checkpoints/step-<number>"
