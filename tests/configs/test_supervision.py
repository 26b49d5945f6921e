import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

WAITS = "import time, configs.supervision as s; s.stop_with_parent(); print('waiting', flush=True); time.sleep(600)"
STARTS_IT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}])"


def test_a_process_ends_with_its_parent_even_by_kill_9():
    parent = subprocess.Popen([sys.executable, "-c", STARTS_IT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "waiting\n"
    parent.kill()
    parent.communicate(timeout=PATIENCE)  # returns when the child, too, has closed the pipe
