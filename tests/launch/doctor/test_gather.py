import json
from pathlib import Path

import pytest

from configs.errors import InputError
from launch.check.packages import installed_versions
from launch.doctor.gather import Section, gather, render

CONFIG = """\
version: 1
run: {name: try, dir: RUNS}
model: {base: some/model}
method: {type: lora}
data: {cache: cache, datasets: [{name: a, target: t, mask: m}]}
train: {steps: 200, global_batch_size: 4, lr: 1e-4}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as a stopped run leaves it."""
    folder = tmp_path / "runs" / "try"
    for step, marker in ((10, True), (20, False)):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors").write_bytes(bytes(3 << 20))
        if marker:
            (folder / "checkpoints" / f"step-{step:08d}" / "COMPLETE").touch()
    (folder / "config.yaml").write_text(CONFIG.replace("RUNS", str(tmp_path / "runs")))
    (folder / "outcome.json").write_text('{"code": 75, "reason": "stopped by SIGTERM", "step": 20}\n')
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in range(1, 21)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "events.jsonl").write_text('{"event": "preempted", "step": 20}\n')
    (folder / "slurm-12.out").write_text("x\n" * 100_000 + "the last word\n")
    return folder


def sections(*given, **environment: str) -> dict[str, list[str]]:
    return {section.title: list(section.lines) for section in gather(given[0] if given else None, environment)}


def test_the_machine_alone_is_versions_hardware_and_environment():
    told = sections()
    assert list(told) == ["Versions", "Machine", "Environment"]
    assert f"torch {installed_versions()['torch']}" in told["Versions"]
    text = "\n".join(told["Machine"])
    assert "CPU cores" in text and "GiB of memory" in text and "GPUs" in text and "free" in text


def test_a_section_without_a_line_is_left_out():
    assert render([Section("Machine", ("2 cores",)), Section("Environment", ())]).count("## ") == 1


def test_variables_that_matter_are_told_and_others_are_not():
    told = sections(CUDA_VISIBLE_DEVICES="0,1", NCCL_DEBUG="INFO", PET_SHUTDOWN_TIMEOUT="600", SLURM_JOB_ID="7",
                    HF_HOME="/hf", HF_TOKEN="secret", SSH_CLIENT="10.0.0.1", DIARY="dear diary")  # fmt: skip
    assert told["Environment"] == [
        "CUDA_VISIBLE_DEVICES=0,1",
        "HF_HOME=/hf",
        "HF_TOKEN is set",
        "NCCL_DEBUG=INFO",
        "PET_SHUTDOWN_TIMEOUT=600",
        "SLURM_JOB_ID=7",
    ]


def test_a_run_is_told_by_its_outcome_checkpoints_and_last_lines(run):
    told = sections(run)
    text = "\n".join(told[f"Run {run}"])
    assert "stopped by SIGTERM" in text
    assert "step-00000010: complete, 3.0 MiB" in text and "step-00000020: not complete, 3.0 MiB" in text
    steps = [json.loads(line)["step"] for line in told["The last lines of metrics.jsonl"]]
    assert steps == [16, 17, 18, 19, 20]
    assert "preempted" in told["The last lines of events.jsonl"][0]
    assert told["The last lines of slurm-12.out"][-1] == "the last word"
    assert len(told["The last lines of slurm-12.out"]) == 40


def test_a_config_leads_to_its_run_and_is_told_as_it_is(run, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((run / "config.yaml").read_text() + "# a comment\n")
    told = sections(path)
    assert "# a comment" in told[f"Config {path}"] and f"Run {run}" in told


def test_what_is_wrong_with_a_config_stands_below_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG.replace("steps: 200", "stps: 200"))
    told = sections(path)
    assert any("train.stps is 200, but there is no such key" in line for line in told[f"Config {path}"])


def test_what_is_neither_a_run_nor_a_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder of a run"):
        list(gather(tmp_path, {}))
    with pytest.raises(InputError, match="neither a run's folder nor a config"):
        list(gather(tmp_path / "nowhere", {}))


def test_a_fence_in_a_log_does_not_end_the_block():
    text = render([Section("Log", ("a", "````", "b"))])
    assert text == "## Log\n\n`````\na\n````\nb\n`````\n"
