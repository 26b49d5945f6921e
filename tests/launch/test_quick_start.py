import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE


def test_the_documents_words_write_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.quick_start", "--gpu_memory", "24GB", "--num_gpus", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=PATIENCE)
    assert (tmp_path / "flux-inpainting" / "migrate_your_data.py").is_file()


def test_bad_input_ends_with_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.quick_start", "--gpu_memory", "no"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "no: there is no such GPU" in done.stderr and "Traceback" not in done.stderr
