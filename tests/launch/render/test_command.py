from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli import app

RECIPE = str(Path(__file__).resolve().parents[3] / "configs" / "fill_lora.yaml")
ON_CLAIM = ("--image", "i", "--claim", "data:/data", "run.dir=/data/runs")


def render(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["render", RECIPE, *words])
    return done.exit_code, done.stdout or done.stderr


def test_a_line_for_each_node() -> None:
    code, output = render("--for", "accelerate", "--nodes", "2", "--gpus-per-node", "4", "--head", "10.0.0.1")
    lines = output.splitlines()
    assert code == 0 and lines[::2] == ["# node 0", "# node 1"]
    assert all("--num_processes 8" in line and "--main_process_ip 10.0.0.1" in line for line in lines[1::2])


@pytest.mark.parametrize("launcher, kind", [("jobset", "JobSet"), ("pytorchjob", "PyTorchJob")])
def test_a_manifest_takes_its_size_from_the_config(launcher: str, kind: str) -> None:
    code, output = render("--for", launcher, "slurm.nodes=3", "slurm.gpu=h100-80gb", *ON_CLAIM)
    assert code == 0 and yaml.safe_load(output)["kind"] == kind
    assert 'nvidia.com/gpu: "8"' in output and "claimName: data" in output


@pytest.mark.parametrize(
    "words, asked",
    [
        (["slurm.gpu=mi300x"], 'amd.com/gpu: "8"'),
        (["slurm.gpu=mi300x", "--gpus-per-node", "4"], 'amd.com/gpu: "4"'),
        (["slurm.gpu=h100-80gb"], 'nvidia.com/gpu: "8"'),
        (["slurm.gpus_per_node=8"], 'nvidia.com/gpu: "8"'),
    ],
)
@pytest.mark.parametrize("launcher", ["jobset", "pytorchjob"])
def test_pods_ask_for_gpus_by_the_name_of_their_maker(launcher: str, words: list[str], asked: str) -> None:
    code, output = render("--for", launcher, *ON_CLAIM, *words)
    assert code == 0 and asked in output and output.count("com/gpu:") == output.count(asked)


@pytest.mark.parametrize("launcher", ["accelerate", "jobset", "pytorchjob"])
def test_gpus_that_encode_for_the_others_are_asked_for_and_not_trained_on(launcher: str) -> None:
    words = ("--nodes", "2", "--gpus-per-node", "8", "data.mode=online", "data.encoder_devices=[cuda:7]")
    code, output = render("--for", launcher, *words, *(("--head", "a") if launcher == "accelerate" else ON_CLAIM))
    assert code == 0
    if launcher == "accelerate":
        assert output.count("--num_processes 14 ") == 2 and output.count("OMP_NUM_THREADS=9 ") == 2, "64 cores of 7"
        return
    assert 'nvidia.com/gpu: "8"' in output
    following = output[output.index("--num-processes") :].splitlines()[1]
    assert following.strip() == '- "7"'


def test_gpus_that_would_be_idle_are_told_beside_the_lines() -> None:
    words = ["render", RECIPE, "--for", "accelerate", "--nodes", "4", "--gpus-per-node", "8", "--head", "a"]
    made = CliRunner().invoke(app, words)
    assert made.stderr == "Only 16 of 32 GPUs have a sample in a step: raise train.global_batch_size\n"
    assert made.exit_code == 0 and "Only" not in made.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--for", "accelerate", "--nodes", "2", "--gpus-per-node", "8"], "--head: give the address"),
        (["--for", "accelerate", "--port", "65536"], "less than or equal to 65535"),
        (
            ["--for", "accelerate", "--nodes", "2", "--gpus-per-node", "8", "--head", "n1", "--port", "0"],
            "--port: several machines meet",
        ),
        (
            ["--for", "accelerate", "--nodes", "2", "--head", "a"],
            "2 nodes, and neither slurm.gpus_per_node nor slurm.gpu",
        ),
        (["--for", "accelerate", "--gpus-per-node", "8", "slurm.gpu=foo"], "slurm.gpu: foo: there is no such GPU"),
        (["--for", "accelerate", "--gpus-per-node", "8", "parallel.engine=single"], "8 GPUs are to train, but"),
        (
            ["--for", "jobset", "--gpus-per-node", "8", "--image", "i", "parallel.engine=hsdp"],
            "1 x 8 GPUs are to train",
        ),
        (["--for", "jobset"], "--image: give the container image"),
        (["--for", "jobset", "--image", "i"], "run.dir runs: in the pods that is"),
    ],
)
def test_what_is_missing_is_said(words: list[str], message: str) -> None:
    code, output = render(*words)
    assert code == 2 and message in output
