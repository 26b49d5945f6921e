from pathlib import Path

import pytest

from configs.loading import json_schema
from configs.problems import dotted_keys
from configs.suggest import REMOVED
from tests.configs.run_file import problems_of


@pytest.mark.parametrize(
    "key, suggestion",
    [
        ("train.leraning_rate", "Did you mean train.lr?"),
        ("train.learning_rate", "Did you mean train.lr?"),
        ("learning_rate", "Did you mean train.lr?"),
        ("lr", "Did you mean train.lr?"),
        ("train.warmup_step", "Did you mean train.warmup_steps?"),
        ("train.Optimizer", "Did you mean train.optimizer?"),
        ("max_train_steps", "Did you mean train.steps?"),
        ("method.lora_rank", "Did you mean method.rank?"),
        ("tain", "Did you mean train?"),
        ("data.datasets.0.wieght", "Did you mean data.datasets.0.weight?"),
        ("train.batch_size", "train.global_batch_size (samples per update, over all GPUs) and train.micro_batch_size"),
        ("train.gradient_accumulation_steps", "train.micro_batch_size (samples per GPU and forward pass)"),
        ("train_batch_size", "Two batch sizes mean it"),
        ("every_steps", "Did you mean validation.every_steps or checkpoint.every_steps?"),
        ("flow.qqqqqqq", "Keys of flow: timestep_sampling, shift"),
        ("qqqqqqq", "Sections: version, run, model"),
        ("checkpoint.requantize", "Remove it: 8-bit optimizer state"),
    ],
)
def test_unknown_key_is_answered_with_the_real_one(config_file: Path, key: str, suggestion: str) -> None:
    (problem,) = problems_of(config_file, f"{key}=1")
    assert f"{key} is 1, but there is no such key." in problem and suggestion in problem


def test_no_key_of_earlier_releases_is_one_of_todays() -> None:
    assert not REMOVED.keys() & set(dotted_keys(json_schema()))
