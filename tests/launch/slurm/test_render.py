"""The text of batch scripts: read by bash, by shellcheck and by people. tests/slurm hands it to a real sbatch."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.gpu_profiles import gpu_names, load_gpu_profile
from configs.loading import load_config
from configs.schema import Config
from launch.slurm.render import quote_directive, render_preprocess, render_train

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "configs" / "fill_lora.yaml"
STORED = Path(__file__).parent / "scripts"
FOLDER = Path("/home/user/it's here")
SITE = (
    "slurm.partition=gpu-h100",
    "slurm.account=team.a",
    "slurm.constraint=h100&ib",
    "slurm.time=1-12:00:00",
    "slurm.memory_per_node=0",
    "slurm.mail_user=me@site.edu",
    "slurm.comment='it is \"$(mine)\" `now` # 1\\2'",
    "slurm.sbatch_lines=[--exclusive, '--licenses=scratch (a)']",
    "slurm.modules=[cuda/12.8, gcc]",
    "slurm.venv=/opt/flux fill",
)
PREPROCESS = (
    "slurm.preprocess.tasks=16",
    "slurm.preprocess.partition=gpu-l40s",
    "slurm.preprocess.qos=short",
    "slurm.preprocess.constraint=l40s",
    "slurm.preprocess.time=4:00:00",
    "slurm.preprocess.gpus_per_node=2",
    "slurm.preprocess.cpus_per_gpu=6",
    "slurm.preprocess.memory_per_node=60G",
    "slurm.preprocess.sbatch_lines=['--licenses=scratch (b)']",
)


def config(*overrides: str) -> Config:
    return load_config(RECIPE, list(overrides))


def scripts() -> dict[str, str]:
    """Scripts by the name of the file that holds what they should be."""
    overrides = ["train.lr=5e-5", "run.dir=my runs"]
    train = {
        f"train-{nodes}.sbatch": render_train(
            config(*SITE, f"slurm.nodes={nodes}"), "my config.yaml", overrides, FOLDER, gpus_per_node=8
        )
        for nodes in (1, 2, 16)
    }
    plain = config("slurm.venv=/opt/fluxfill")
    preprocess = {
        f"preprocess-{kind}.sbatch": render_preprocess(plain, "a.yaml", [], Path("/work"), kind)
        for kind in ("array", "rest")
    }
    for name, keys in {"as-training": SITE, "apart": (*SITE, *PREPROCESS)}.items():
        text = render_preprocess(config(*keys), "a.yaml", [], Path("/work"), "array")
        preprocess[f"preprocess-{name}.sbatch"] = text
    return train | preprocess


@pytest.mark.parametrize("name", sorted(scripts()))
def test_scripts_are_as_stored(name: str) -> None:
    """After a change that is meant: `python -m tests.launch.slurm.test_render`, and read the difference."""
    assert scripts()[name] == (STORED / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [*sorted(STORED.glob("*.sbatch")), *sorted((ROOT / "slurm").glob("*.sbatch"))], ids=lambda path: path.name
)
def test_bash_and_shellcheck_find_nothing(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "--norc", "--severity=info", path], check=True)


@pytest.mark.parametrize("nodes", [1, 2, 16])
def test_every_gpu_gets_the_stored_script_with_its_own_counts(nodes: int, tmp_path: Path) -> None:
    stored = (STORED / f"train-{nodes}.sbatch").read_text(encoding="utf-8")
    paths = []
    for name in gpu_names():
        gpus = load_gpu_profile(name).gpus_per_node or 4  # else the machine decides
        site = config(*SITE, f"slurm.nodes={nodes}")
        text = render_train(site, "my config.yaml", ["train.lr=5e-5", "run.dir=my runs"], FOLDER, gpus_per_node=gpus)
        counts = {"gpus-per-node=8": f"gpus-per-node={gpus}", "cpus-per-task=64": f"cpus-per-task={8 * gpus}"}
        expected = stored.replace(f"{nodes} x 8 GPUs", f"{nodes} x {gpus} GPUs")
        for old, new in counts.items():
            expected = expected.replace(old, new)
        assert text == expected, name
        paths.append(tmp_path / f"{name}.sbatch")
        paths[-1].write_text(text, encoding="utf-8")
    for path in paths:
        subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "--norc", "--severity=info", *paths], check=True)


def test_bash_hands_on_what_was_given_and_runs_nothing_of_it(tmp_path: Path) -> None:
    odd = ["run.dir=a b", "data.captions.default=$(touch harm) `touch harm` \"'\n; touch harm", "--x=*"]
    folder = tmp_path / "it's $(touch harm)"
    folder.mkdir()
    text = render_train(config("slurm.venv=/v"), "$(touch harm).yaml", odd, folder, gpus_per_node=1)
    shown = text.replace("exec /v/bin/python", "printf '%s\\0'")
    printed = subprocess.run(["bash"], input=shown, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert printed.split("\0")[:-1] == ["-P", "-m", "launch.slurm.job", "train", "$(touch harm).yaml", *odd]
    assert [path.name for path in tmp_path.rglob("harm")] == []


@pytest.mark.parametrize("name", ["50%", "a\\b", "a\nb"])
def test_a_folder_that_a_log_cannot_be_named_after_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="submit the job from another folder"):
        render_train(config(), "a.yaml", [], Path("/work") / name, gpus_per_node=1)


def test_plain_values_stay_plain_and_others_are_quoted_as_sbatch_reads_them() -> None:
    assert quote_directive("/a/b-%j.log") == "/a/b-%j.log"
    for value in ("a b", "it's", 'a"b\\c', "#", "$(x)"):
        assert shlex.split(quote_directive(value)) == [value]


def test_every_option_that_sbatch_gets_comes_before_the_first_command() -> None:
    for text in scripts().values():
        lines = text.splitlines()
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
        assert options and max(options) < min(commands)


if __name__ == "__main__":
    for stored, script in scripts().items():
        (STORED / stored).write_text(script, encoding="utf-8")
