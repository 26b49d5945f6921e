import json
import socket
import sys
from pathlib import Path

import pytest

from configs.errors import StorageFailed
from configs.supervision import BAD_INPUT, FAILED, STOPPED
from data.preprocessing.worker import which_worker
from launch.slurm import node
from launch.supervise import Outcome

RECIPE = str(Path(__file__).resolve().parents[3] / "configs" / "fill_lora.yaml")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list:
    """Command line and environment of what is started on the second of three nodes, in the place of training."""
    lines: list = []

    def note(command, environment, *_, **__) -> Outcome:
        lines.append(command)
        lines.append(environment)
        return Outcome(STOPPED, "stopped by SIGUSR1", 4)

    monkeypatch.setattr(node, "run_supervised", note)
    monkeypatch.setattr(node, "run_workers", note)
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "3")
    return lines


def options_of(command: list[str]) -> dict[str, str]:
    words = command[5 : command.index("--config")]
    return dict(zip(words[0::2], words[1::2], strict=False))


def test_a_node_starts_its_share_of_one_world(started: list) -> None:
    where = ["--processes", "8", "--engine", "ddp", "--head", "10.0.0.7", "--port", "12345"]
    assert node.main(["train", *where, RECIPE, "train.lr=5e-5"]) == STOPPED
    options = options_of(started[0])
    assert options["--num_processes"] == "24", "nodes x processes of each: accelerate divides it by the nodes"
    assert (options["--num_machines"], options["--machine_rank"]) == ("3", "1")
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("10.0.0.7", "12345")
    assert options["--config_file"].endswith("/ddp.yaml")
    assert started[0][-3:] == ["--config", RECIPE, "train.lr=5e-5"]


def test_scratch_is_named_by_the_nodes_own_variables(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_DISK", "/nvme/77")
    node.main(["train", "--processes", "1", RECIPE, "slurm.scratch=$JOB_DISK/shards"])
    assert started[0][-1] == "data.local_cache=/nvme/77/shards"


def test_scratch_of_a_variable_that_is_not_set_is_bad_input(started: list, tmp_path: Path) -> None:
    run = (f"run.dir={tmp_path}", "run.name=r")
    (tmp_path / "r").mkdir()
    assert node.main(["train", "--processes", "1", RECIPE, *run, "slurm.scratch=$NO_SUCH_DISK/shards"]) == BAD_INPUT
    assert started == []
    told = json.loads((tmp_path / "r" / "outcome.json").read_text())
    assert told["code"] == BAD_INPUT and "$NO_SUCH_DISK" in told["reason"] and "slurm.env" in told["reason"]


def test_a_node_that_does_not_see_the_config_says_so_with_its_name(
    started: list, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert node.main(["train", "--processes", "1", str(tmp_path / "none.yaml")]) == BAD_INPUT
    told = capfd.readouterr().err
    assert told.startswith(socket.gethostname()) and "none.yaml" in told and started == []


def test_a_node_that_does_not_see_the_config_says_so_to_the_others(
    started: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for its ranks for half an hour, and the job would start again for the same."""
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(tmp_path / "outcome.json"))
    assert node.main(["train", "--processes", "1", str(tmp_path / "none.yaml")]) == BAD_INPUT
    told = json.loads((tmp_path / "outcome.json").read_text())
    assert told["code"] == BAD_INPUT and told["reason"].startswith(f"{socket.gethostname()}: ")
    (tmp_path / "outcome.json").write_text("the word of another node")
    assert node.main(["train", "--processes", "1", str(tmp_path / "none.yaml")]) == BAD_INPUT
    assert (tmp_path / "outcome.json").read_text() == "the word of another node"


def test_a_config_whose_storage_does_not_answer_one_node_ends_no_job_for_good(
    started: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: object) -> None:
        raise StorageFailed(f"{path}: cannot be read (Input/output error).")

    monkeypatch.setattr(node, "load_config", refuse)
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(tmp_path / "outcome.json"))
    assert node.main(["train", "--processes", "1", RECIPE]) == FAILED
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == FAILED


def test_ranks_that_cannot_save_leave_the_job_time_to_start_again(started: list) -> None:
    node.main(["train", "--processes", "1", RECIPE])
    assert started[1]["PET_SHUTDOWN_TIMEOUT"] == "210"
    node.main(["train", "--processes", "1", RECIPE, "slurm.signal_seconds=60"])
    assert started[3]["PET_SHUTDOWN_TIMEOUT"] == "30"


def test_preprocessing_starts_a_worker_for_each_gpu_and_numbers_them_through(started: list) -> None:
    node.main(["preprocess", "--processes", "2", RECIPE])
    command, environments = started
    assert command == [sys.executable, "-P", "-m", "data.preprocess", "--config", RECIPE]
    workers = [which_worker(environment) for environment in environments]
    assert [(worker.index, worker.count, worker.device_index) for worker in workers] == [(2, 6, 0), (3, 6, 1)]
