"""Who may read what a run makes."""

from pathlib import Path


def apply_umask(folder: Path) -> None:
    """Let the safetensors files directly in a folder be read by whom the user's umask allows.

    safetensors makes them readable by their owner alone: a team's other members could not load an adapter.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
