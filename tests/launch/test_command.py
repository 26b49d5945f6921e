import shlex
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.loading import load_config
from data.preprocessing.worker import which_worker
from launch.command import (
    Node,
    check_node,
    choose_engine,
    choose_on_nodes,
    render_command,
    render_environment,
    render_shell_line,
    render_worker_environments,
)
from launch.gpus import count_gpus, count_training_gpus

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "fill_lora.yaml"


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
    assert choose_engine(asked, num_processes, num_gpus) == chosen


def test_single_engine_refuses_several_processes() -> None:
    with pytest.raises(
        InputError, match=r"engine is single, which is one process, but 2 are .*set parallel\.engine=ddp"
    ):
        choose_engine("single", 2, num_gpus=8)


@pytest.mark.parametrize(
    "engine, nodes, gpus, encoding, chosen",
    [
        ("auto", 1, 0, None, ("single", 1)),  # a CPU
        ("auto", 2, 8, "cuda:7", ("ddp", 7)),
        ("single", 1, 2, "cuda:1", ("single", 1)),
        ("hsdp", 2, 3, "cuda:2", ("hsdp", 2)),
    ],
)
def test_engine_and_processes_on_nodes_of_so_many_gpus(
    engine: str, nodes: int, gpus: int, encoding: str | None, chosen: tuple[str, int]
) -> None:
    online = ["data.mode=online", f"data.encoder_devices=[{encoding}]"] if encoding else []
    config = load_config(RECIPE, ["model.precision=bf16", f"parallel.engine={engine}", *online])
    assert choose_on_nodes(config, nodes, gpus) == chosen


@pytest.mark.parametrize(
    "engine, nodes, gpus, message",
    [
        ("single", 1, 8, "8 GPUs are to train, .* one process: set slurm.gpus_per_node=1, or parallel.engine=ddp"),
        ("single", 2, 1, "set slurm.nodes=1 and slurm.gpus_per_node=1, or parallel.engine=ddp"),
        ("hsdp", 1, 8, "but 1 x 8 GPUs are to train: set slurm.nodes and .*, or parallel.engine=fsdp2"),
        ("hsdp", 2, 1, "but 2 x 1 GPUs are to train"),
    ],
)
def test_an_engine_that_cannot_start_on_the_nodes_is_refused(engine: str, nodes: int, gpus: int, message: str) -> None:
    config = load_config(RECIPE, ["model.precision=bf16", f"parallel.engine={engine}"])
    with pytest.raises(InputError, match=message):
        choose_on_nodes(config, nodes, gpus)


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
    assert command[:5] == [sys.executable, "-P", "-m", "launch.without_traceback", "accelerate.commands.launch"]
    options = dict(zip(command[5:11:2], command[6:11:2], strict=True))
    assert options["--num_processes"] == "4" and options["--main_process_port"] == "29501"
    assert Path(options["--config_file"]).is_file() and options["--config_file"].endswith("configs/engines/ddp.yaml")
    assert Path(command[11]).is_absolute() and command[11].endswith("/trainer/main.py")
    assert command[12:] == ["--config", "my runs/a.yaml", "train.lr=5e-5", "data.resolution=[512, 768]"]


def test_relative_config_path_stays_as_typed() -> None:
    assert "./a/../b.yaml" in render_command("./a/../b.yaml", [], "single", 1, port=0)


def test_environment_lets_signals_through_and_splits_the_cores() -> None:
    variables = render_environment(Path("runs/x/outcome.json"), num_processes=3, num_cores=16, inherited={})
    assert variables == {
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
        "PET_SHUTDOWN_TIMEOUT": "600",
        "FLUXFILL_OUTCOME": "runs/x/outcome.json",
        "OMP_NUM_THREADS": "5",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    own = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    assert not any("ALLOC_CONF" in name for name in render_environment(Path("x"), 1, 2, inherited=own))
    assert render_environment(Path("x"), 8, 2, inherited={})["OMP_NUM_THREADS"] == "1"
    assert render_environment(Path("x"), 1, 2, inherited={"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_workers_take_a_gpu_each_and_share_terminal_and_cores() -> None:
    first, second = render_worker_environments(2, num_cores=12, inherited={})
    workers = [which_worker(environment) for environment in (first, second)]
    assert [(worker.index, worker.count, worker.device_index, worker.rank) for worker in workers] == [
        (0, 2, 0, 0),
        (1, 2, 1, 1),
    ]
    assert first["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert first["OMP_NUM_THREADS"] == "6" and first["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    "node, port, message",
    [
        (Node(2, 2, "h"), 29500, "--node-rank is 2, but --nodes 2 are numbered 0 to 1"),
        (Node(0, 2, "h"), 0, "--port: several machines meet at a port that all of them know"),
    ],
)
def test_a_node_that_would_never_meet_the_others_is_refused(node: Node, port: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_node(node, port)
    assert check_node(Node(0, 1, "h"), 0) == Node(0, 1, "h")


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


def test_windows_starts_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there hands a signal on, and torch's launcher would have to."""
    monkeypatch.setattr("launch.command.SIGNALS_CAN_BE_SENT", False)
    assert choose_engine("auto", 1, num_gpus=2) == ("single", 1)
    command = render_command("a.yaml", ["train.lr=1"], "single", 1, port=0)
    assert Path(command[2]).name == "main.py" and command[3:] == ["--config", "a.yaml", "train.lr=1"]
    for asked, count in (("auto", 2), ("ddp", 1), ("zero2", 1)):
        with pytest.raises(InputError, match=r"needs Linux, or WSL2 on Windows.*--num-processes 1"):
            choose_engine(asked, count, num_gpus=2)


def test_a_checkpoint_to_go_on_from_is_handed_to_the_trainer():
    command = render_command("a.yaml", ["train.lr=1"], "single", 1, port=0, resume="runs/a/checkpoints/step-00000002")
    assert command[-5:] == ["--config", "a.yaml", "--resume", "runs/a/checkpoints/step-00000002", "train.lr=1"]
    assert "--resume" not in render_command("a.yaml", ["train.lr=1"], "single", 1, port=0, resume="auto")
