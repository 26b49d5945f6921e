import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from data.encoders.model_folder import find_model
from launch.check.model import check_model
from launch.cli import app
from launch.command import REPO_ROOT
from tests.launch.fetch.hub_server import COMMIT, NAME, Hub

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def fetch(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["fetch", *map(str, arguments)])


def test_a_model_of_the_hub_is_said_as_the_config_wants_it(hub: Hub, tmp_path: Path) -> None:
    done = fetch("FLUX.1-Fill-dev")
    assert done.exit_code == 0 and done.stdout.endswith(f"model.base: {NAME}\n")
    pinned = fetch("FLUX.1-Fill-dev", "--revision", COMMIT).stdout.rpartition("model.base: ")[2].strip()
    assert pinned == str(tmp_path / "cache" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT)
    own = fetch(NAME, "--out", tmp_path / "own").stdout.rpartition("model.base: ")[2].strip()
    assert find_model(own) == tmp_path / "own"


def test_an_endpoint_and_a_cache_of_the_environment_are_used_and_jobs_need_no_network(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-P", "-m", "launch"]
    done = subprocess.run(
        [*command, "fetch", "FLUX.1-Fill-dev"], env=environment, capture_output=True, text=True, cwd=REPO_ROOT
    )
    assert done.returncode == 0, done.stderr
    hub.close()
    code = f"from data.encoders.model_folder import find_model; print(find_model({NAME!r}))"
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, cwd=REPO_ROOT)
    assert found.stdout.startswith(str(tmp_path / "home")), found.stderr


def test_a_damaged_model_of_the_hub_is_refused(hub: Hub) -> None:
    (hub.folder / "transformer" / "config.json").write_text("{}")  # as it lists it, so the checksum is right
    done = fetch("FLUX.1-Fill-dev")
    assert done.exit_code == 2 and "neither FLUX.1-Fill-dev (384) nor FLUX.1-dev (64)" in done.stderr


def test_a_gated_model_ends_in_exit_code_2_without_a_traceback(hub: Hub) -> None:
    hub.gated = True
    done = fetch("FLUX.1-Fill-dev")
    assert done.exit_code == 2 and "Accept its licence on" in done.stderr and "Traceback" not in done.output


def test_a_folder_is_looked_through_and_copied(tiny_model: Path, tmp_path: Path) -> None:
    assert fetch(tiny_model).stdout == f"model.base: {tiny_model}\n"
    done = fetch(tiny_model, "--out", tmp_path / "copy")
    assert done.stdout == f"model.base: {tmp_path / 'copy'}\n"
    assert [made.state for made in check_model(tmp_path / "copy")[1]] == ["ok"]
    (tmp_path / "copy" / WEIGHTS).write_bytes(b"cut off")
    done = fetch(tmp_path / "copy")
    assert done.exit_code == 2 and "header cannot be read" in done.stderr


def test_a_transformers_file_and_a_hub_become_a_model(
    hub: Hub, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the hub the parts that were not given, and no weights of the transformer."""

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        """In this process, which has torch already."""
        module = command.index("-m") + 1
        return subprocess.CompletedProcess(command, import_module(command[module]).main(command[module + 1 :]))

    monkeypatch.setattr(subprocess, "run", run)
    file = tmp_path / "flux1-fill-dev.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(tiny_model / WEIGHTS).items()}, file)
    done = fetch(file, "--out", tmp_path / "model")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith(f"model.base: {tmp_path / 'model'}\n")
    assert WEIGHTS.as_posix() not in hub.sent and "vae/diffusion_pytorch_model.safetensors" in hub.sent
    assert [made.state for made in check_model(tmp_path / "model")[1]] == ["ok"]
    assert load_file(tmp_path / "model" / WEIGHTS)["x_embedder.weight"].dtype == torch.bfloat16


def test_the_files_given_are_handed_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        seen.append(command)
        shutil.copytree(tiny_model, tmp_path / "out")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("transformer", "vae", "clip", "t5")}
    for file in files.values():
        shutil.copyfile(tiny_model / WEIGHTS, file)
    options = [f"--{name}={files[name]}" for name in ("vae", "clip", "t5")]
    assert fetch(files["transformer"], "--rest", tiny_model, "--out", tmp_path / "out", *options).exit_code == 0
    module = [sys.executable, "-P", "-m", "trainer.export.from_files"]
    assert seen == [[*module, str(files["transformer"]), f"--rest={tiny_model}", f"--out={tmp_path / 'out'}", *options]]


def test_a_dev_asks_the_hub_for_a_dev(hub: Hub, tiny_dev_model: Path, tmp_path: Path) -> None:
    done = fetch(tiny_dev_model / WEIGHTS, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "black-forest-labs/FLUX.1-dev: " in done.stderr


def test_a_conversion_that_is_refused_ends_with_its_code(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    file = tiny_model / WEIGHTS
    assert fetch(file, "--rest", tiny_model, "--out", tmp_path / "out").exit_code == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.safetensors", "--out", "o"], "nowhere.safetensors: there is no such file"),
        (["flux1-fill-dev-Q8_0.gguf", "--out", "o"], "only .safetensors files are read"),
        (["{file}"], "Say where: --out DIR"),
        (["{file}", "--out", "{model}"], "is there already"),
        (["{vae}", "--out", "o"], "no transformer of FLUX.1-Fill-dev (384 inputs) or FLUX.1-dev (64)"),
        (["{file}", "--out", "o", "--vae", "ae.ckpt"], "ae.ckpt: only .safetensors files are read"),
        (["{file}", "--out", "o", "--rest", "nowhere"], "--rest nowhere: no such folder, nor a hub id"),
        (["{model}", "--out", "{model}"], "is there already"),
        (["{model}", "--out", "{file}/out"], "/out: cannot be made"),
        (["{model}", "--revision", "main"], "belongs to a hub id"),
        (["{file}", "--out", "o", "--rest", "{model}", "--revision", "main"], "belongs to a hub id"),
        (["{model}", "--vae", "{vae}"], "--vae: belongs to a transformer's .safetensors file"),
        (["FLUX.1-Fill-dev", "--rest", "{model}"], "--rest: belongs to a transformer's .safetensors file"),
        (["nowhere"], "nowhere: no such file or folder, nor a hub id"),
        (["a/b/c"], "a/b/c: no such file or folder, nor a hub id"),
        (["a/b--c"], "a/b--c: no hub id"),
    ],
)
def test_bad_input_says_what_to_do(
    arguments: list[str], message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "model": tiny_model,
        "file": tiny_model / WEIGHTS,
        "vae": tiny_model / "vae" / "diffusion_pytorch_model.safetensors",
    }
    done = fetch(*(argument.format(**places) for argument in arguments))
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert list(tmp_path.iterdir()) == []


def test_room_for_the_folder_is_looked_for_first(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("launch.fetch.hub.shutil.disk_usage", lambda _: usage._replace(free=1000))
    for source in (tiny_model, tiny_model / WEIGHTS):
        done = fetch(source, *([] if source == tiny_model else ["--rest", tiny_model]), "--out", tmp_path / "out")
        assert done.exit_code == 2 and "GiB are to be written, and 0.00 GiB are free" in done.stderr
    assert list(tmp_path.iterdir()) == []
