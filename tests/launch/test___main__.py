import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE


def test_the_module_is_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text("raise RuntimeError('a file of the user')")
    command = [sys.executable, "-P", "-m", "launch", "train", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "nowhere.yaml: there is no such file" in done.stderr
