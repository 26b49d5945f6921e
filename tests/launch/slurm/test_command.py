from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.slurm.restarts import read_job_events

RECIPE = str(Path(__file__).resolve().parents[3] / "configs" / "fill_lora.yaml")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch that counts up from job 100; the file holds the options that each job got."""
    asked = tmp_path / "asked"
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\necho "$@ ${{FLUXFILL_CHAIN:+chained}} ${{FLUXFILL_CHAIN_LAST:+last}} "'
        f'"${{SBATCH_NO_REQUEUE:+leaked}}" >> {asked}\n'
        f"expr 99 + $(wc -l < {asked})\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache" / "fill-lora").mkdir(parents=True)
    (tmp_path / "cache" / "fill-lora" / "manifest.json").touch()
    return asked


def fluxfill(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["slurm", *words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.mark.parametrize("command", ["render", "submit"])
def test_help_of_every_command_has_an_example(command: str) -> None:
    assert f"Example: fluxfill slurm {command}" in fluxfill(command, "--help")


def test_what_is_rendered_is_what_is_submitted(sbatch: Path, tmp_path: Path) -> None:
    printed = fluxfill("render", RECIPE, "train.lr=5e-5", "--nodes", "4", "--gpu", "h100-80gb")
    assert "#SBATCH --nodes=4" in printed and "train.lr=5e-5" in printed
    fluxfill("render", RECIPE, "train.lr=5e-5", "--nodes", "4", "--gpu", "h100-80gb", "--out", str(tmp_path / "out"))
    fluxfill("submit", RECIPE, "train.lr=5e-5", "--nodes", "4", "--gpu", "h100-80gb")
    names = ("out/train.sbatch", "runs/fill-lora/slurm/train.sbatch")
    assert {(tmp_path / name).read_text() for name in names} == {printed}
    assert sbatch.read_text().split() == ["--parsable", "runs/fill-lora/slurm/train.sbatch"]


def test_training_waits_for_the_job_that_does_what_the_array_left(sbatch: Path) -> None:
    printed = fluxfill("submit", RECIPE, "--with-preprocess")
    array, rest, train = sbatch.read_text().splitlines()
    assert array.split()[1:] == ["runs/fill-lora/slurm/preprocess.sbatch"]
    assert rest.split()[1:] == ["--dependency=afterany:100", "runs/fill-lora/slurm/preprocess-rest.sbatch"]
    assert train.split()[1:3] == ["--dependency=afterok:101", "--kill-on-invalid-dep=yes"]
    assert [line.split()[0] for line in printed.splitlines()] == ["100", "101", "102"]


def test_a_job_that_is_submitted_from_within_a_chain_is_none_of_it(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXFILL_CHAIN", "outer")
    monkeypatch.setenv("FLUXFILL_CHAIN_LAST", "1")
    fluxfill("submit", RECIPE)
    assert "chained" not in sbatch.read_text() and "last" not in sbatch.read_text()


def test_the_jobs_of_a_chain_follow_each_other_when_one_was_not_finished(sbatch: Path) -> None:
    fluxfill("submit", RECIPE, "slurm.chain=3")
    lines = sbatch.read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["chained", "chained", "last"], "the last one is told that it is"
    assert "chained" in lines[2]
    dependencies = [next((word for word in line.split() if "dependency" in word), "") for line in lines]
    assert dependencies == ["", "--dependency=afternotok:100", "--dependency=afternotok:101"]


def test_a_job_that_would_find_no_cache_is_not_submitted(sbatch: Path) -> None:
    message = fluxfill("submit", RECIPE, "data.cache=elsewhere", code=2)
    assert "no finished cache is there. Add --with-preprocess to make it first" in message
    assert "a cache is made in a folder" in fluxfill(
        "submit", RECIPE, "data.cache=s3://b/c", "data.local_cache=/nvme", "--with-preprocess", code=2
    )
    fluxfill("submit", RECIPE, "data.cache=elsewhere", "--with-preprocess")
    assert len(sbatch.read_text().splitlines()) == 3


def test_a_profile_tells_how_many_gpus_a_node_has(sbatch: Path) -> None:
    assert "#SBATCH --gpus-per-node=8" in fluxfill("render", RECIPE, "--gpu", "h100-80gb")
    assert "#SBATCH --gpus-per-node=4" in fluxfill("render", RECIPE, "slurm.gpus_per_node=4", "--gpu", "h100-80gb")
    assert "#SBATCH --gpus-per-node=1" in fluxfill("render", RECIPE)
    assert "set slurm.gpus_per_node" in fluxfill("render", RECIPE, "--gpu", "rtx4090", code=2)
    assert "there is no such GPU" in fluxfill("render", RECIPE, "--gpu", "h900", code=2)
    for empty in (["--gpu", ""], ["slurm.gpu="]):  # a variable of the shell that is not set
        assert 'slurm.gpu is "", but ' in fluxfill("render", RECIPE, *empty, code=2)
    assert "#SBATCH --gpus-per-node=1" in fluxfill("render", RECIPE, "slurm.gpu=null")


@pytest.mark.parametrize("command", ["render", "submit"])
def test_several_nodes_of_which_nobody_says_how_many_gpus_they_have_are_refused(sbatch: Path, command: str) -> None:
    """Else they would train on one GPU each."""
    message = fluxfill(command, RECIPE, "--nodes", "4", code=2)
    assert "4 nodes, and neither slurm.gpus_per_node nor slurm.gpu says" in message and not sbatch.exists()
    for said in (["slurm.gpus_per_node=1"], ["slurm.gpu=h100-80gb"], ["--gpu", "h100-80gb"]):
        assert "#SBATCH --nodes=4" in fluxfill("render", RECIPE, "--nodes", "4", *said)


@pytest.mark.parametrize("command", ["render", "submit"])
@pytest.mark.parametrize(
    "engine, message",
    [
        (
            "single",
            "8 GPUs are to train, but parallel.engine is single, which is one process: set slurm.gpus_per_node=1",
        ),
        ("hsdp", "1 x 8 GPUs are to train: set slurm.nodes"),
    ],
)
def test_an_engine_that_the_job_would_refuse_is_refused_before_it_waits(
    sbatch: Path, command: str, engine: str, message: str
) -> None:
    words = ("slurm.gpus_per_node=8", f"parallel.engine={engine}", "model.precision=bf16")
    said = fluxfill(command, RECIPE, *words, code=2)
    assert message in said and "--num-processes" not in said and not sbatch.exists()


@pytest.mark.parametrize("command", ["render", "submit"])
@pytest.mark.parametrize("nodes, told", [("2", ""), ("4", "Only 16 of 32 GPUs have a sample in a step: raise train.")])
def test_gpus_that_would_be_idle_are_told_beside_the_script(sbatch: Path, command: str, nodes: str, told: str) -> None:
    result = CliRunner().invoke(app, ["slurm", command, RECIPE, "--gpu", "h100-80gb", "--nodes", nodes])
    assert result.exit_code == 0 and "Only" not in result.stdout
    assert result.stderr == (f"{told}global_batch_size\n" if told else "")
    whole = ("--nodes", "4", "train.global_batch_size=32")
    assert not CliRunner().invoke(app, ["slurm", command, RECIPE, "--gpu", "h100-80gb", *whole]).stderr


@pytest.mark.parametrize("command", ["render", "submit"])
@pytest.mark.parametrize(
    "words, message",
    [
        (["data.mode=online", "data.encoder_devices=[cuda:9]"], "data.encoder_devices names cuda:9, but "),
        (["slurm.gpu=foo"], "slurm.gpu: foo: there is no such GPU"),
    ],
)
def test_gpus_that_are_not_there_are_refused_before_the_job_waits(
    sbatch: Path, command: str, words: list[str], message: str
) -> None:
    assert message in fluxfill(command, RECIPE, "slurm.gpus_per_node=2", *words, code=2) and not sbatch.exists()


def test_submitted_jobs_are_noted_in_the_runs_folder(sbatch: Path, tmp_path: Path) -> None:
    fluxfill("submit", RECIPE, "slurm.chain=2")
    events = read_job_events(tmp_path / "runs" / "fill-lora")
    assert [(event.job, event.what) for event in events] == [("100", "submitted"), ("101", "submitted")]
