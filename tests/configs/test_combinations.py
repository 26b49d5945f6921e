"""Rules of what goes together: complete, alike everywhere, and with a way out of every refusal."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from configs.combinations import CHOICES, NOTES, REFUSED, Combination, all_combinations, check_engine, notes_of, refuse
from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config, ModelConfig, ParallelConfig, TrainConfig

ROOT = Path(__file__).parents[2]

CONFIG = """\
run: {name: try}
model: {base: some/model}
method: {type: lora}
data: {cache: cache, datasets: [{name: a, target: t, mask: m}]}
train: {steps: 200, global_batch_size: 4, lr: 1e-4, optimizer: adamw}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_the_rules_know_every_word_of_the_schema() -> None:
    assert set(CHOICES["precision"]) == set(get_args(ModelConfig.model_fields["precision"].annotation))
    engines = set(get_args(ParallelConfig.model_fields["engine"].annotation))
    assert set(CHOICES["engine"]) == engines - {"auto"}
    for key in ("optimizer", "weights", "compile"):
        assert set(CHOICES[key]) == set(get_args(TrainConfig.model_fields[key].annotation))
    methods = {
        section.model_fields["type"].annotation for section in get_args(Config.model_fields["method"].annotation)
    }
    assert set(CHOICES["method"]) == {name for method in methods for name in get_args(method)}


@pytest.mark.parametrize("rule", [*REFUSED, *NOTES], ids=lambda rule: "-".join(next(iter(rule.when.values()))))
def test_a_rule_speaks_of_words_that_exist(rule) -> None:
    assert all(set(values) <= set(CHOICES[key]) for key, values in rule.when.items())


def test_every_refusal_names_a_combination_that_works_and_changes_nothing_that_could_stay() -> None:
    refused = [found for combination in all_combinations() if (found := refuse(combination))]
    assert refused
    for refusal in refused:
        assert refusal.changes and refuse(refusal.nearest) is None
        for key in refusal.changes:
            assert refuse(replace(refusal.nearest, **{key: getattr(refusal.asked, key)})) is not None


@pytest.mark.parametrize(
    "asked, changes",
    [
        (Combination("full", "nf4", "adamw", "fsdp2"), {"precision": "bf16"}),
        (Combination("lora", "bf16", "adafactor", "zero3"), {"optimizer": "adamw8bit"}),
        (Combination("full", "bf16", "prodigy", "fsdp2"), {"optimizer": "adamw8bit"}),
        (Combination("lora", "int8", "adamw", "zero3"), {"engine": "fsdp2"}),
        (Combination("lora", "nf4", "adamw", "zero3"), {"engine": "fsdp2"}),
        (Combination("full", "bf16", "adamw8bit", "fsdp2", "bf16_stochastic"), {"optimizer": "adamw"}),
        (Combination("full", "bf16", "adamw", "zero2", "bf16_stochastic"), {"engine": "fsdp2"}),
        (
            Combination("full", "bf16", "adamw8bit", "zero2", "bf16_stochastic"),
            {"optimizer": "adamw", "engine": "fsdp2"},
        ),
        (Combination("full", "fp32", "adamw", "ddp", "bf16_stochastic"), {"precision": "bf16"}),
        (Combination("lora", "bf16", "adamw", "ddp", "bf16_stochastic"), {"weights": "fp32_master"}),
    ],
)
def test_the_nearest_combination_keeps_what_matters_most(asked: Combination, changes: dict[str, str]) -> None:
    refusal = refuse(asked)
    assert refusal is not None and refusal.changes == changes


def test_loading_refuses_with_line_reason_and_remedy(config_file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(config_file, ["method={type: full}", "model.precision=nf4"])
    assert str(caught.value) == (
        "command line: method.type full and model.precision nf4 do not go together: full training changes every weight "
        "of the base, and a quantized weight cannot take a small change. Nearest that works: model.precision=bf16."
    )


def test_auto_is_refused_only_once_it_has_become_an_engine_that_cannot(config_file: Path) -> None:
    config = load_config(config_file, ["model.precision=int8"])
    check_engine(config, "ddp")
    with pytest.raises(InputError, match=r"under zero3.*shards plain numbers.*parallel\.engine=fsdp2"):
        check_engine(config, "zero3")
    with pytest.raises(InputError, match=r"run\.yaml:\d+|command line"):
        load_config(config_file, ["model.precision=int8", "parallel.engine=zero3"])


def test_what_is_done_otherwise_is_noted(config_file: Path) -> None:
    config = load_config(config_file, ["train.optimizer=adamw8bit"])
    assert notes_of(config, "ddp") == []
    (note,) = notes_of(config, "fsdp2")
    assert note.startswith("adamw8bit under fsdp2: bitsandbytes works on the local shards")
