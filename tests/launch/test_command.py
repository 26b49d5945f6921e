import shlex
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from data.preprocessing.worker import which_worker
from launch.command import (
    choose_engine,
    render_command,
    render_environment,
    render_shell_line,
    render_worker_environments,
)
from launch.gpus import count_gpus, count_training_gpus


@pytest.mark.parametrize(
    "asked, num_processes, num_gpus, chosen",
    [
        ("auto", None, 0, ("single", 1)),
        ("auto", None, 1, ("single", 1)),
        ("auto", None, 8, ("ddp", 8)),
        ("auto", 2, 0, ("ddp", 2)),
        ("auto", 1, 8, ("single", 1)),
        ("single", None, 8, ("single", 1)),
        ("ddp", None, 0, ("ddp", 1)),
        ("ddp", None, 4, ("ddp", 4)),
        ("ddp", 3, 4, ("ddp", 3)),
    ],
)
def test_engine_follows_the_config_then_the_gpus(
    asked: str, num_processes: int | None, num_gpus: int, chosen: tuple[str, int]
) -> None:
    assert choose_engine(asked, num_processes, num_gpus) == chosen  # type: ignore[arg-type]


def test_single_engine_refuses_several_processes() -> None:
    with pytest.raises(InputError, match=r"--num-processes is 2, but parallel\.engine is single.*parallel\.engine=ddp"):
        choose_engine("single", 2, num_gpus=8)


@pytest.mark.parametrize(
    "num_gpus, encoder_devices, count",
    [
        (8, None, 8),
        (2, ["cuda:1"], 1),
        (8, ["cuda:7", "cuda:6"], 6),
        (8, ["cpu"], 8),
        (1, ["cuda:0"], 1),
        (2, ["cuda:0"], 2),  # it trains and encodes
        (0, ["cuda:1"], 0),  # the trainer says that there is none
        (1, ["cuda:5"], 1),
    ],
)
def test_gpus_that_encode_are_not_trained_on(num_gpus, encoder_devices, count) -> None:
    assert count_training_gpus(num_gpus, encoder_devices) == count


def test_command_is_accelerate_with_the_engine_file_and_the_trainer() -> None:
    command = render_command("my runs/a.yaml", ["train.lr=5e-5", "data.resolution=[512, 768]"], "ddp", 4, port=29501)
    assert command[:4] == [sys.executable, "-P", "-m", "accelerate.commands.launch"]
    options = dict(zip(command[4:10:2], command[5:10:2], strict=True))
    assert options["--num_processes"] == "4" and options["--main_process_port"] == "29501"
    assert Path(options["--config_file"]).is_file() and options["--config_file"].endswith("configs/engines/ddp.yaml")
    assert Path(command[10]).is_absolute() and command[10].endswith("/trainer/main.py")
    assert command[11:] == ["--config", "my runs/a.yaml", "train.lr=5e-5", "data.resolution=[512, 768]"]


def test_relative_config_path_stays_as_typed() -> None:
    assert "./a/../b.yaml" in render_command("./a/../b.yaml", [], "single", 1, port=0)


def test_environment_lets_signals_through_and_splits_the_cores() -> None:
    variables = render_environment(Path("runs/x/outcome.json"), num_processes=3, num_cores=16, inherited={})
    assert variables == {
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
        "PET_SHUTDOWN_TIMEOUT": "600",
        "FLUXFILL_OUTCOME": "runs/x/outcome.json",
        "OMP_NUM_THREADS": "5",
    }
    assert render_environment(Path("x"), 8, 2, inherited={})["OMP_NUM_THREADS"] == "1"
    assert render_environment(Path("x"), 1, 2, inherited={"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_workers_take_a_gpu_each_and_share_terminal_and_cores() -> None:
    first, second = render_worker_environments(2, num_cores=12, inherited={})
    workers = [which_worker(environment) for environment in (first, second)]
    assert [(worker.index, worker.count, worker.device_index, worker.rank) for worker in workers] == [
        (0, 2, 0, 0),
        (1, 2, 1, 1),
    ]
    assert first["OMP_NUM_THREADS"] == "6" and first["LOCAL_WORLD_SIZE"] == "2"


def test_shell_line_says_the_same_when_pasted() -> None:
    command = render_command("a b.yaml", ["data.captions.default=it's; $HOME"], "single", 1, port=0)
    line = render_shell_line(command, {"FLUXFILL_OUTCOME": "runs/a b/outcome.json"})
    assert shlex.split(line) == ["FLUXFILL_OUTCOME=runs/a b/outcome.json", *command]


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ],
)
def test_gpus_are_those_the_driver_lists_and_the_user_allows(
    environment: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: NVIDIA H200'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert count_gpus(environment) == expected


def test_machine_without_a_driver_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus({}) == 0
