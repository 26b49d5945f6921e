import subprocess
import sys

from tests.patience import PATIENCE

WAITS = "import time, configs.supervision as s; s.stop_with_parent(); print('waiting', flush=True); time.sleep(600)"
STARTS_IT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}])"


def test_a_process_ends_with_its_parent_even_by_kill_9():
    parent = subprocess.Popen([sys.executable, "-c", STARTS_IT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "waiting\n"
    parent.kill()
    parent.communicate(timeout=PATIENCE)  # returns when the child, too, has closed the pipe
