import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.loading import load_config
from configs.schema import Config
from configs.section import Section
from configs.slurm_schema import ContainerConfig, PreprocessJobConfig, SlurmConfig, problem_of_signal
from tests.configs.run_file import problems_with, smallest

ROOT = Path(__file__).resolve().parents[2]


def slurm(**keys: Any) -> SlurmConfig:
    return Config.model_validate(smallest() | {"slurm": keys}).slurm


def test_every_key_may_be_left_out() -> None:
    assert Config.model_validate(smallest()).slurm == SlurmConfig()


@pytest.mark.fault(27, "names for jobs that a shell or sbatch would read")
@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "reservation", "constraint", "exclude", "time", "interface", "mail_user"]
)
@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH --uid=0", "$(touch x)", "`id`", 'a"b', "a'b", "a;b", "", "a\n"])
def test_what_is_a_name_takes_no_text_that_a_shell_or_sbatch_would_read(key: str, value: str) -> None:
    with pytest.raises(ValidationError, match=rf"slurm\.{key}"):
        slurm(**{key: value})
    if key in PreprocessJobConfig.model_fields:
        with pytest.raises(ValidationError, match=rf"slurm\.preprocess\.{key}"):
            slurm(preprocess={key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("partition", "gpu-h100,gpu_a100"),
        ("account", "team.a@site"),
        ("constraint", "[rack1|rack2]*2&h100"),
        ("exclude", "n[03-05],n17"),
        ("time", "2-12"),
        ("time", "90"),
        ("time", "24:00:00"),
        ("mail_user", "a.b+c@site.edu"),
        ("memory_per_node", "0"),
        ("comment", 'it\'s $HOME; "quoted" # ok'),
        ("sbatch_lines", ["--licenses=scratch:1", "--exclusive", "--switches=1@12:00"]),
        ("env", {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "=mlx5_0,mlx5_1"}),
        ("container", {"runtime": "pyxis", "image": "nvcr.io#x/y:1"}),
    ],
)
def test_what_clusters_ask_for_is_taken(key: str, value: Any) -> None:
    slurm(**{key: value})


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("comment", "two\nlines", "line break or another control character"),
        ("sbatch_lines", ["--mem-bind=local\n#SBATCH --uid=0"], "line break"),
        ("sbatch_lines", ["-p gpu"], "no long option of sbatch: write --name"),
        ("sbatch_lines", ["--nodes=4"], "--nodes has a key of its own"),
        ("sbatch_lines", ["--no-requeue"], "is set by the script"),
        ("env", {"HF_TOKEN": "x"}, "HF_TOKEN looks like a secret"),
        ("env", {"WANDB_API_KEY": "x"}, "WANDB_API_KEY looks like a secret"),
        ("env", {"A B": "x"}, "pattern"),
        ("venv", "/a\nb", "line break"),
        ("modules", ["cuda; rm -rf"], "pattern"),
        ("nodes", 0, "greater than 0"),
        ("preprocess", {"tasks": 0}, "greater than 0"),
        ("preprocess", {"sbatch_lines": ["--array=0-9"]}, "--array has a key of its own"),
        ("preprocess", {"memory_per_node": "all"}, "pattern"),
    ],
)
def test_what_would_harm_is_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        slurm(**{key: value})


def test_a_wrong_time_is_told_by_examples_not_by_a_pattern(config_file: Path) -> None:
    (problem,) = problems_with(config_file, "version: 1\n", 'version: 1\nslurm: {time: "1 day"}\n')
    assert 'slurm.time is "1 day", but must be text as 24:00:00 or 2-12:00:00, a whole number' in problem


@pytest.mark.parametrize(
    "time, seconds",
    [("4", 240), (4, 240), ("7:30", 450), ("0:30:00", 1800), ("1-2", 93600), ("1-2:30", 95400)],
)
def test_a_signal_that_comes_before_half_of_the_time_is_a_problem(time: str | int, seconds: int) -> None:
    """Of --time=4 SLURM would tell the run to stop as it starts."""
    assert problem_of_signal(slurm(time=time, signal_seconds=seconds // 2)) is None
    told = rf"slurm.time is {time}, {seconds:,} s.* slurm.signal_seconds={seconds // 2} or less"
    assert re.search(told, str(problem_of_signal(slurm(time=time, signal_seconds=seconds // 2 + 1))))


@pytest.mark.parametrize("unlimited", [None, "UNLIMITED", "0", "0:00:00"])
def test_where_the_time_has_no_limit_no_signal_comes_early(unlimited: str | None) -> None:
    assert problem_of_signal(slurm(time=unlimited, signal_seconds=10**6)) is None


def test_the_default_of_a_signal_is_held_to_the_time_too_but_not_of_a_run_that_is_over(config_file: Path) -> None:
    """A saved run is exported and evaluated whatever its jobs asked for."""
    (problem,) = problems_with(config_file, "version: 1\n", "version: 1\nslurm: {time: 4}\n")
    assert "slurm.signal_seconds is 300, but slurm.time is 4, 240 s" in problem
    assert load_config(config_file, saved_by_a_run=True).slurm.time == 4
    assert problem_of_signal(slurm(time=10)) is None


@pytest.mark.parametrize("section", [SlurmConfig, PreprocessJobConfig, ContainerConfig])
def test_every_key_stands_on_the_page(section: type[Section]) -> None:
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    assert [key for key in section.model_fields if not re.search(rf"\b{key}\b", page)] == []
