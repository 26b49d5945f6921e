"""The files of a quickstart folder: the config loads and says what was chosen; scripts run from any folder, wherever
they lie."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from configs.flux_shape import FluxShape
from configs.gpu_profiles import gpu_names, load_gpu_profile
from configs.loading import load_config
from configs.memory import encoding_memory, training_memory
from configs.slurm_schema import PreprocessJobConfig, SlurmConfig
from launch.cli import app
from launch.command import REPO_ROOT
from launch.plan.asked import sample_tokens
from launch.quickstart.choices import choose
from launch.quickstart.render import EXECUTABLE, render_files
from launch.quickstart.seed_names import render_seed_names, seed_names

ODD = """it's a "folder" of $(touch pwned) `touch pwned` & co; 图"""
MODEL = "black-forest-labs/FLUX.1-Fill-dev"


def render(
    gpu: str = "80gb",
    *,
    num_gpus: int = 1,
    nodes: int = 1,
    online: bool = False,
    folder: Path = Path("/runs/flux"),
    model: str = MODEL,
    python: str = sys.executable,
    slurm: SlurmConfig | None = None,
) -> dict[str, str]:
    choices = choose(load_gpu_profile(gpu), num_gpus=num_gpus, num_nodes=nodes, online=online)
    return render_files(choices, gpu_name=gpu, folder=folder, model=model, python=python, slurm=slurm or SlurmConfig())


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / ODD
    folder.mkdir()
    return folder


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
        (folder / name).chmod(0o755 if name in EXECUTABLE else 0o644)


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "num_gpus, nodes, online", [(1, 1, False), (2, 1, False), (1, 1, True), (2, 1, True), (8, 4, True)]
)
@pytest.mark.parametrize("gpu", gpu_names())
def test_the_config_loads_and_says_what_was_chosen(
    tmp_path: Path, gpu: str, num_gpus: int, nodes: int, online: bool
) -> None:
    choices = choose(load_gpu_profile(gpu), num_gpus=num_gpus, num_nodes=nodes, online=online)
    path = tmp_path / "train_flux_inpainting.yaml"
    path.write_text(render(gpu, num_gpus=num_gpus, nodes=nodes, online=online)[path.name], encoding="utf-8")
    config = load_config(path)
    assert config.model.base == MODEL and config.model.precision == choices.precision
    assert config.train.activation_checkpointing is choices.checkpointing
    assert config.train.global_batch_size == choices.global_batch_size
    assert config.data.mode == ("online" if online else "cached")
    assert config.data.encoder_devices == (list(choices.encoder_devices) or None)
    assert config.data.encoders.t5_precision == choices.t5_precision
    assert tuple(config.data.resolution) == choices.resolutions
    tokens = sample_tokens(config)
    counted = training_memory(config, FluxShape(), "single", processes=1, tokens=tokens)
    if online and num_gpus == 1:
        counted += encoding_memory(config.data, pixels=max(config.data.resolution) ** 2)
    total = sum(part.gib for part in counted)
    assert f": {total:.1f} of " in path.read_text(encoding="utf-8"), "as `fluxfill check` and `fluxfill plan` count"
    assert (config.slurm.gpu, config.slurm.nodes, config.slurm.gpus_per_node) == (gpu, nodes, num_gpus)


@pytest.mark.parametrize(
    "gib, num_gpus, summary",
    [
        (16, 2, "one GPU trains, and cuda:1 encodes for it.\n"),
        (16, 3, "one GPU trains, and cuda:1 encodes for it. cuda:2 does nothing: a GPU of"),
        (16, 7, "3 GPUs train, and cuda:3, cuda:4 and cuda:5 encode for them. cuda:6 does nothing: a GPU of"),
        (24, 3, "2 GPUs train, and cuda:2 encodes for them.\n"),
    ],
)
def test_the_readme_says_what_each_gpu_of_an_online_run_does(
    tmp_path: Path, gib: int, num_gpus: int, summary: str
) -> None:
    card = tmp_path / "card.yaml"
    card.write_text(f"name: A card\nuntested: true\nmemory_gib: {gib}\n")
    assert f"while it trains: {summary}" in render(str(card), num_gpus=num_gpus, online=True)["README.md"]


def test_the_config_holds_the_documents_choices_each_with_its_reason(tmp_path: Path) -> None:
    text = render("24gb", num_gpus=1)["train_flux_inpainting.yaml"]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "run.yaml")
    assert (config.train.lr, config.train.steps, config.train.optimizer) == (1e-4, 2000, "adamw8bit")
    assert (config.train.ema_decay, config.train.lr_schedule, config.data.resolution) == (0.99, "constant", [512, 768])
    for key in ("mode", "precision", "optimizer", "global_batch_size", "activation_checkpointing"):
        assert re.search(rf"^  {key}: \S+ # \S", text, re.MULTILINE), f"{key} has no reason"


@pytest.mark.parametrize("model", [f"/models/{ODD}", "/models/a: b # c", "/models/\ttab", MODEL, "a/1.0"])
def test_a_models_folder_is_read_back_as_it_is_called(tmp_path: Path, model: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(render(model=model)["train_flux_inpainting.yaml"], encoding="utf-8")
    assert load_config(path).model.base == model


@pytest.mark.parametrize("num_gpus, nodes, online", [(1, 1, False), (2, 1, True), (8, 16, False)])
def test_scripts_are_right_for_bash_and_shellcheck(odd: Path, num_gpus: int, nodes: int, online: bool) -> None:
    files = render(num_gpus=num_gpus, nodes=nodes, online=online, folder=odd, python=f"/{ODD}/python")
    scripts = [name for name in files if name.endswith((".sh", ".sbatch"))]
    assert len(scripts) == 3
    write(odd, files)
    for name in scripts:
        subprocess.run(["bash", "-n", name], cwd=odd, check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash alone has read the scripts")
    # SC2016: the odd path holds $(...), which is meant as it stands.
    subprocess.run(
        ["shellcheck", "--norc", "--severity=info", "--shell=bash", "--exclude=SC2016", *scripts], cwd=odd, check=True
    )


def test_start_training_runs_where_it_lies_with_the_python_that_wrote_it(odd: Path, tmp_path: Path) -> None:
    python = program(odd / "python", '#!/bin/bash\nif [ "$2" = -c ]; then exit; fi\npwd\nprintf "%s\\n" "$@"\n')
    write(odd, render(num_gpus=2, online=True, folder=odd, python=str(python)))
    printed = subprocess.check_output([odd / "start_training.sh", "a=[b, c]", "d"], text=True, cwd=tmp_path)
    line = ["-P", "-m", "launch", "train", "train_flux_inpainting.yaml", "--num-processes", "1", "a=[b, c]", "d"]
    assert printed.splitlines() == [str(odd), *line], "one of the two GPUs encodes"
    assert list(tmp_path.rglob("pwned")) == []


def test_start_training_says_when_no_python_has_fluxfill(odd: Path) -> None:
    program(odd / "python3", "#!/bin/bash\nexit 1\n")
    program(odd / "python", "#!/bin/bash\nexit 1\n")
    write(odd, render(folder=odd, python="/nowhere/python"))
    done = subprocess.run(
        [odd / "start_training.sh"], env={"PATH": f"{odd}:{os.environ['PATH']}"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "set FLUXFILL_PYTHON to the Python that has it" in done.stderr


def test_a_job_without_fluxfill_in_its_venv_names_the_venv(odd: Path) -> None:
    venv = odd / "no venv"
    write(odd, render(folder=odd, slurm=SlurmConfig(venv=str(venv))))
    done = subprocess.run(["bash", odd / "train.sbatch"], capture_output=True, text=True)
    assert done.returncode == 2 and f"no fluxfill in {venv}/bin/python, the Python of slurm.venv. " in done.stderr
    assert "set FLUXFILL_PYTHON to the Python that has it" in done.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "preprocess.sbatch"])
def test_a_job_runs_in_its_folder_from_slurms_copy_of_the_script(odd: Path, tmp_path: Path, name: str) -> None:
    """What the job does then is tested in tests/launch/slurm, and on a real SLURM in tests/slurm."""
    python = program(odd / "python", '#!/bin/bash\nif [ "$2" = -c ]; then exit; fi\nprintf "%s\\n" "$PWD" "$@"\n')
    write(odd, render(num_gpus=3, nodes=2, online=True, folder=odd, python=str(python)))
    spooled = tmp_path / "slurm_script"
    spooled.write_text((odd / name).read_text())
    printed = subprocess.check_output(["bash", spooled, "a=[b, c]"], text=True, cwd=tmp_path)
    where, *line = printed.splitlines()
    work = name.removesuffix(".sbatch")
    assert where == str(odd)
    assert line == ["-m", "launch.slurm.job", work, "train_flux_inpainting.yaml", "a=[b, c]"]
    assert list(tmp_path.rglob("pwned")) == []


@pytest.mark.parametrize("name", ["train.sbatch", "preprocess.sbatch"])
def test_a_job_asks_for_what_was_chosen_before_its_first_command(name: str) -> None:
    lines = render(num_gpus=4, nodes=3)[name].splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--nodes=3", "--gpus-per-node=4", "--requeue", "--open-mode=append"} <= asked
    assert ("--signal=USR1@300" in asked) is (name == "train.sbatch")
    assert {"##SBATCH --partition=gpu", "##SBATCH --account=project"} <= set(lines)
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("#SBATCH" in line for line in lines[first:]), "sbatch reads none behind the first command"


@pytest.mark.parametrize("name", ["train.sbatch", "preprocess.sbatch"])
def test_a_job_asks_for_what_the_configs_section_slurm_says(name: str) -> None:
    slurm = SlurmConfig(
        partition="gpu", account="team", time="1-12", comment='a "b"', cpus_per_gpu=4, signal_seconds=600
    )
    lines = render(num_gpus=4, nodes=3, slurm=slurm)[name].splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--partition=gpu", "--account=team", r'--comment="a \"b\""', "--cpus-per-task=16"} <= set(asked)
    assert [line for line in asked if line.startswith("--time")] == ["--time=1-12"]
    assert ("--signal=USR1@600" in asked) is (name == "train.sbatch")
    assert not any(line.startswith("##") for line in lines)


def test_the_job_that_preprocesses_asks_for_what_its_own_section_says() -> None:
    """And for what training asks for where it says nothing, as in `fluxfill slurm render`."""
    own = PreprocessJobConfig(time="02:00:00", cpus_per_gpu=3, memory_per_node="100G", qos="short")
    slurm = SlurmConfig(account="team", time="1-12", memory_per_node="0", qos="long", preprocess=own)
    asked = {
        name: set(render(num_gpus=4, slurm=slurm)[name].splitlines()) for name in ("preprocess.sbatch", "train.sbatch")
    }
    words = ("account=team", "time=02:00:00", "cpus-per-task=12", "mem=100G", "qos=short")
    assert {f"#SBATCH --{word}" for word in words} <= asked["preprocess.sbatch"]
    words = ("account=team", "time=1-12", "cpus-per-task=32", "mem=0", "qos=long")
    assert {f"#SBATCH --{word}" for word in words} <= asked["train.sbatch"]


def test_the_job_that_preprocesses_takes_tasks_and_gpus_of_its_own_where_they_are_set() -> None:
    plain = render(num_gpus=4, nodes=2)["preprocess.sbatch"]
    assert "#SBATCH --nodes=2\n" in plain and "#SBATCH --gpus-per-node=4\n" in plain and "--array" not in plain
    files = render(num_gpus=4, nodes=2, slurm=SlurmConfig(preprocess=PreprocessJobConfig(gpus_per_node=2)))
    asked = files["preprocess.sbatch"]
    for word in ("nodes=2", "gpus-per-node=2", "cpus-per-task=16", "output=%x-%j.log"):
        assert f"#SBATCH --{word}\n" in asked
    assert "#SBATCH --gpus-per-node=4\n" in files["train.sbatch"]
    own = PreprocessJobConfig(tasks=16)
    asked = render(num_gpus=4, nodes=2, slurm=SlurmConfig(preprocess=own))["preprocess.sbatch"]
    for word in ("array=0-15", "nodes=1", "gpus-per-node=1", "cpus-per-task=8", "output=%x-%A_%a.log"):
        assert f"#SBATCH --{word}\n" in asked


@pytest.mark.parametrize("name", ["train.sbatch", "preprocess.sbatch"])
def test_a_job_loads_the_modules_and_takes_the_python_of_the_section_slurm(
    odd: Path, tmp_path: Path, name: str
) -> None:
    (odd / "venv" / "bin").mkdir(parents=True)
    program(odd / "venv" / "bin" / "python", '#!/bin/bash\nif [ "$2" = -c ]; then exit; fi\necho "venv $LOADED"\n')
    other = program(odd / "python", '#!/bin/bash\nif [ "$2" = -c ]; then exit; fi\necho other\n')
    slurm = SlurmConfig(modules=["cuda/12.4", "gcc"], venv=str(odd / "venv"))
    files = render(folder=odd, python=str(other), slurm=slurm)
    write(odd, files)
    assert files[name].startswith("#!/bin/bash -l\n") and "\nmodule load cuda/12.4 gcc\n" in files[name]
    loads = 'module() { export LOADED="$*"; }; export -f module; exec bash "$0"'
    printed = subprocess.check_output(["bash", "-c", loads, odd / name], text=True, cwd=tmp_path)
    assert printed == "venv load cuda/12.4 gcc\n" and list(tmp_path.rglob("pwned")) == []
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", "--norc", "--severity=info", "--exclude=SC2016", odd / name], check=True)
    assert subprocess.check_output([odd / "start_training.sh"], text=True) == "other\n", "it is no SLURM job"


def test_the_engine_file_is_the_engines_own() -> None:
    assert "distributed_type: MULTI_GPU" in render(num_gpus=2)["engine.yaml"]
    assert "configs/engines/single.yaml" in render(num_gpus=2, online=True)["engine.yaml"]


def test_the_engine_file_says_that_no_script_reads_it() -> None:
    files = render(num_gpus=2)
    assert [name for name, text in files.items() if "engine.yaml" in text] == ["README.md"]
    assert files["engine.yaml"].startswith(
        "# For `accelerate launch` by hand: a copy of fluxfill's configs/engines/ddp.yaml."
    )
    assert "start_training.sh and train.sbatch do not\n# read it" in files["engine.yaml"]


def test_the_batch_file_is_one_that_cmd_reads() -> None:
    text = render()["start_training.bat"]
    assert text.isascii() and text.count("\n") == text.count("\r\n") > 10
    lines = text.split("\r\n")
    labels = {line[1:] for line in lines if line.startswith(":")}
    assert {word for word in re.findall(r"goto (\w+)", text)} == labels == {"native"}
    wsl = lines.index('wsl.exe --cd "%~dp0." -e bash ./start_training.sh %*')
    native = lines.index(
        '"%FLUXFILL_PYTHON%" -P -m launch train train_flux_inpainting.yaml --num-processes 1 parallel.engine=single %*'
    )
    assert wsl < lines.index(":native") < native
    assert lines[wsl + 1] == lines[native + 1] == "exit /b %errorlevel%", "the exit code is the run's"
    assert lines[0] == "@echo off" and 'cd /d "%~dp0" || exit /b 2' in lines


def migrate(folder: Path, *arguments: str, python: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    """Run migrate_your_data.py from the root folder, beside a `fluxfill migrate` that prints what it is given."""
    tools = folder / "tools"
    (tools / "launch" / "quickstart").mkdir(parents=True)
    (tools / "launch" / "__init__.py").touch()
    (tools / "launch" / "quickstart" / "__init__.py").touch()
    (tools / "launch" / "__main__.py").write_text(
        "import os, sys\nprint(os.getcwd(), *sys.argv[1:], sep='\\n')\nsys.exit(75)"
    )
    command = [*python, folder / "migrate_your_data.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tools), "HOME": "/home/me"}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


def test_migration_waits_for_the_three_paths(odd: Path) -> None:
    write(odd, render(folder=odd))
    done = migrate(odd)
    assert done.returncode == 2 and done.stdout == ""
    assert "still has the example's paths for target_images, masked_images, masks" in done.stderr


def test_migration_hands_the_three_paths_on(odd: Path) -> None:
    files = render(folder=odd)
    script = files["migrate_your_data.py"]
    script = script.replace("/path/to/your/target_image_dir", "~/old/after").replace(
        "/path/to/your/mask_dir", "../masks"
    )
    write(odd, files | {"migrate_your_data.py": script})
    done = migrate(odd)
    assert done.returncode == 2 and "example's paths for masked_images." in done.stderr
    shutil.rmtree(odd / "tools")
    for folder, given in (("/old/be fore", ["--masked", "/old/be fore"]), ("", [])):
        (odd / "migrate_your_data.py").write_text(script.replace("/path/to/your/source_image_dir", folder))
        done = migrate(odd, "--dry-run")
        assert done.returncode == 75, "the exit code is migrate's"
        where, *line = done.stdout.splitlines()
        pictures = ["--target", "/home/me/old/after", *given, "--mask", "../masks"]
        to = ["--out", "dataset", "--config", "train_flux_inpainting.yaml", "--dry-run"]
        assert where == str(odd) and line == ["migrate", *pictures, *to]
        shutil.rmtree(odd / "tools")


def test_migration_names_the_python_that_has_fluxfill(odd: Path) -> None:
    files = render(folder=odd, python=f"/{ODD}/python")
    for name in ("target_image_dir", "source_image_dir", "mask_dir"):
        files["migrate_your_data.py"] = files["migrate_your_data.py"].replace(f"/path/to/your/{name}", f"/old/{name}")
    write(odd, files)
    done = migrate(odd, python=(sys.executable, "-I", "-S"))
    assert done.returncode == 2 and f"Run this file with /{ODD}/python" in done.stderr


def test_a_run_on_several_nodes_is_started_by_slurm_and_elsewhere_on_one() -> None:
    assert "| Linux | `./start_training.sh` |" in render()["README.md"]
    files = render(num_gpus=8, nodes=4)
    assert "| one node | `./start_training.sh` |" in files["README.md"] and "| SLURM, 4 nodes |" in files["README.md"]
    assert (
        "trains on one node, and goes on where it stopped; sbatch train.sbatch on all"
        in files["train_flux_inpainting.yaml"]
    )


def test_the_readme_holds_the_table_and_names_every_file() -> None:
    files = render()
    assert render_seed_names("en") in files["README.md"]
    assert [name for name in files if name != "README.md" and f"`{name}`" not in files["README.md"]] == []


def test_every_command_and_page_that_the_files_name_is_there() -> None:
    files = [*render().values(), *render(num_gpus=2, online=True).values(), *(row["zh"] for row in seed_names())]
    text = "\n".join(files)
    pages = set(re.findall(r"docs/[\w/-]+\.md", text))
    assert len(pages) == 7 and [page for page in pages if not (REPO_ROOT / page).is_file()] == []
    program = typer.main.get_group(app)
    context = program.make_context("fluxfill", ["help"])
    typed = re.findall(r"`fluxfill ([a-z-]+)([^`]*)`", text) + re.findall(r"-m launch ([a-z-]+)(.*)", text)
    assert {
        "fetch",
        "quickstart",
        "migrate",
        "check",
        "train",
        "preprocess",
        "retire",
        "import-config",
        "doctor",
        "plan",
        "slurm",
    } == {command for command, _ in typed}
    for command, rest in typed:
        _, known, _ = program.resolve_command(context, [command])
        options = {option for parameter in known.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, (command, rest)
