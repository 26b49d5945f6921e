"""Orphans of programs that a test starts."""

from configs import supervision


def adopt_no_orphans() -> None:
    """Undo what a supervisor in this process has asked for. A test that waits for an orphan's end would see it for
    ever: nobody here takes note of that."""
    if supervision._PRCTL is not None:
        supervision._PRCTL(supervision._PR_SET_CHILD_SUBREAPER, 0)
