import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from configs.gpu_profiles import FOLDER
from configs.loading import load_config
from launch.cli import app

CONFIG = "train_flux_inpainting.yaml"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def quickstart(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quickstart", *arguments])


@pytest.mark.parametrize("memory, gpus", [("--gpu-memory", "--num-gpus"), ("--gpu_memory", "--num_gpus")])
def test_the_folder_is_written_and_says_what_comes_next(memory: str, gpus: str) -> None:
    done = quickstart(memory, "80GB", gpus, "2")
    assert done.exit_code == 0 and "edit the three paths in flux-inpainting/migrate_your_data.py" in done.stdout
    assert load_config(f"flux-inpainting/{CONFIG}").train.global_batch_size == 4
    subprocess.run(["bash", "-n", "flux-inpainting/start_training.sh"], check=True)
    assert sys.executable in Path("flux-inpainting/start_training.sh").read_text()
    again = quickstart(memory, "80GB", gpus, "2")
    assert again.exit_code == 0 and "nothing to write, all is there" in again.stdout


def test_a_models_folder_is_found_from_the_new_folder() -> None:
    Path("models/fill").mkdir(parents=True)
    assert quickstart("--gpu", "h100", "--model", "models/fill").exit_code == 0
    assert load_config(f"flux-inpainting/{CONFIG}").model.base == str(Path("models/fill").resolve())


def test_an_edited_file_is_kept_and_its_difference_shown() -> None:
    quickstart("--gpu-memory", "40GB", "--num-gpus", "2", "--out", "here")
    config = Path("here", CONFIG)
    config.write_text(config.read_text().replace("lr: 1e-4", "lr: 5e-5"))
    mine = config.read_text()
    same = quickstart("--gpu-memory", "40GB", "--num-gpus", "2", "--out", "here")
    assert same.exit_code == 0 and f"{CONFIG}: kept as you edited it." in same.stderr
    start = Path("here", "start_training.sh").read_text()
    other = quickstart("--gpu-memory", "24GB", "--out", "here")
    assert other.exit_code == 2 and "Nothing was written" in other.stderr and "--force" in other.stderr
    for shown in (same.stderr, other.stderr):
        assert any(line.startswith("-  lr: 5e-5") for line in shown.splitlines())
        assert any(line.startswith("+  lr: 1e-4") for line in shown.splitlines())
    assert config.read_text() == mine and Path("here", "start_training.sh").read_text() == start
    assert quickstart("--gpu-memory", "24GB", "--out", "here", "--force").exit_code == 0
    assert load_config(config).model.precision == "int8"


def test_the_section_slurm_of_the_config_comes_into_the_jobs_when_it_is_run_again() -> None:
    words = ("--gpu-memory", "40GB", "--num-gpus", "2", "--out", "here")
    quickstart(*words)
    config, job = Path("here", CONFIG), Path("here", "train.sbatch")
    assert "##SBATCH --account=project" in job.read_text() and "#SBATCH --time=24:00:00" in job.read_text()
    written = config.read_text()
    for key in ("partition", "account", "time"):  # as the comment at its end says
        written = written.replace(f"  # {key}:", f"  {key}:")
    config.write_text(written.replace("24:00:00", "08:00:00"))
    assert load_config(config).slurm.account == "project"
    again = quickstart(*words)
    assert again.exit_code == 0 and "written: here/train.sbatch" in again.stdout
    for name in ("train.sbatch", "preprocess.sbatch"):
        text = Path("here", name).read_text()
        assert "\n#SBATCH --account=project\n" in text and "\n#SBATCH --time=08:00:00\n" in text


def test_a_config_that_does_not_load_is_named_and_the_sites_options_stay_in_the_jobs() -> None:
    words = ("--gpu-memory", "40GB", "--num-gpus", "2", "--out", "here")
    quickstart(*words)
    config = Path("here", CONFIG)
    config.write_text(config.read_text().replace("  # account:", "  account:"))
    quickstart(*words)
    good = config.read_text()
    config.write_text(good.replace("every_steps: 250", "every_stps: 250", 1))
    before = {path.name: path.read_bytes() for path in Path("here").iterdir()}
    again = quickstart(*words)
    assert again.exit_code == 2 and "every_stps" in again.stderr
    assert "Nothing was written: mend it and run quickstart again" in again.stderr
    assert {path.name: path.read_bytes() for path in Path("here").iterdir()} == before
    assert "\n#SBATCH --account=project\n" in Path("here", "train.sbatch").read_text()
    assert quickstart(*words, "--force").exit_code == 0 and load_config(config)


@pytest.mark.parametrize("gpu", ["h100-80gb", "own.yaml"])
def test_plan_and_slurm_take_the_gpus_that_were_given(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the config alone, and from its own folder."""
    shutil.copy(FOLDER / "h100-80gb.yaml", "own.yaml")
    assert quickstart("--gpu", gpu, "--num-gpus", "4", "--nodes", "3", "--out", "here").exit_code == 0
    monkeypatch.chdir("here")
    planned = CliRunner().invoke(app, ["plan", CONFIG])
    assert planned.exit_code == 0 and f"{CONFIG} on 3 x 4 x NVIDIA H100 80GB SXM5" in planned.stdout
    rendered = CliRunner().invoke(app, ["slurm", "render", CONFIG])
    for line in ("#SBATCH --nodes=3\n", "#SBATCH --gpus-per-node=4\n"):
        assert line in rendered.stdout and line in Path("train.sbatch").read_text()


def test_edited_paths_are_kept_when_the_gpu_becomes_another() -> None:
    quickstart("--gpu-memory", "24GB", "--out", "here")
    script = Path("here", "migrate_your_data.py")
    script.write_text(script.read_text().replace("/path/to/your/mask_dir", "/masks"))
    mine = script.read_text()
    other = quickstart("--gpu-memory", "80GB", "--out", "here")
    assert other.exit_code == 0 and "Next: edit the three paths" in other.stdout  # two of them are the example's
    assert script.read_text() == mine and load_config(f"here/{CONFIG}").model.precision == "bf16"


def test_what_comes_next_is_not_to_edit_paths_that_are_edited() -> None:
    quickstart("--gpu-memory", "24GB", "--out", "here")
    script = Path("here", "migrate_your_data.py")
    script.write_text(re.sub(r"/path/to/your/\w+_dir", "/pictures", script.read_text()))
    again = quickstart("--gpu-memory", "24GB", "--out", "here")
    assert again.exit_code == 0 and f"Next: run {script}. here/README.md says the rest." in again.stdout


def test_once_pictures_are_taken_over_nothing_is_written_for_another_gpu() -> None:
    """As the guide says of Step 3, which edits the config."""
    quickstart("--gpu-memory", "24GB", "--out", "here")
    before = {path.name: path.read_bytes() for path in Path("here").iterdir()}
    config = Path("here", CONFIG)
    config.write_text(config.read_text().replace("target: dataset/target", "target: elsewhere"))
    before[CONFIG] = config.read_bytes()
    other = quickstart("--gpu-memory", "80GB", "--out", "here")
    assert other.exit_code == 2 and "Nothing was written. Give another --out" in other.stderr
    assert {path.name: path.read_bytes() for path in Path("here").iterdir()} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Say which GPU: --gpu-memory 24GB, 40GB or 80GB"),
        (["--gpu", "h100", "--gpu-memory", "80GB"], "one of the two"),
        (["--gpu-memory", "81GB"], "81GB: there is no such GPU. Nearest: "),
        (["--gpu", "a100"], "Take one of: a100-40gb, a100-80gb"),
        (["--gpu-memory", "80GB", "--out", "/dev/null"], "Give another --out"),
    ],
)
def test_bad_input_writes_nothing(arguments: list[str], message: str) -> None:
    done = quickstart(*arguments)
    assert done.exit_code == 2 and message in done.stderr and list(Path().iterdir()) == []
