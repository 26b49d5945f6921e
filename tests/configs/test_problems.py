from pathlib import Path

import pytest

from tests.configs.run_file import VALID, problems_of, problems_with


@pytest.mark.parametrize("text", ["yes", "on", "no", "off", "1.0"])
def test_only_true_and_false_are_booleans(config_file: Path, text: str) -> None:
    (problem,) = problems_of(config_file, f"train.activation_checkpointing={text}")
    assert "must be auto, true, false or a whole number of at least 0" in problem


def test_a_line_names_key_value_limit_and_remedy(config_file: Path) -> None:
    (problem,) = problems_with(config_file, "steps: 200", "steps: true")
    assert problem == (f"{config_file}:16: train.steps is true, but must be a whole number above 0. For example: 4000")
    (problem,) = problems_with(config_file, "rank: 16", "rank: 2.5")
    assert problem.startswith(f"{config_file}:7: method.rank is 2.5, but must be a whole number above 0. ")
    assert problem.endswith("Leave the key out for the default, 32.")


def test_no_word_of_pydantic_reaches_the_user(config_file: Path) -> None:
    every_section_wrong = VALID.replace("lr: 1e-4", "lr: fast\n  warmup_steps: 300\n  micro_batch_size: [9]")
    config_file.write_text(every_section_wrong.replace("type: lora", "type: lola"), encoding="utf-8")
    problems = problems_of(config_file, "flow=3", "data.datasets.0=x", "data.resolution=[[1]]", "run.name=1")
    text = "\n".join(problems).replace(str(config_file), "FILE")
    assert not [
        word for word in ("pydantic", "Input should", "type=", "Value error", "literal[", "int-") if word in text
    ]


@pytest.mark.parametrize(
    "override, remedy",
    [
        ("data.resolution=[512,100]", "Nearest: 96 or 112."),
        ("train.lr_schedule=Cosine", "Did you mean cosine?"),
        ("train.micro_batch_size=atuo", "Did you mean auto?"),
        ("train.steps='300'", "Write it without quotes, underscores or commas: 300"),
        ("train.steps=1_000", "Write it without quotes, underscores or commas: 1000"),
        ("train.steps=1,000", "Write it without quotes, underscores or commas: 1000"),
        ("train.steps=1,5", "must be a whole number above 0. For example"),
        ("train.lr=1,5e-4", "Decimals have a point, not a comma: 1.5e-4"),
        ("train.lr='0,0001'", "Decimals have a point, not a comma: 0.0001"),
        ("train.max_grad_norm=1,500", "Decimals have a point, not a comma: 1.500 or 1500"),
        ("train.weight_decay=-1,5", "Decimals have a point, not a comma: -1.5"),
        ("flow.shift=10,000,000", "Write it without quotes, underscores or commas: 10000000"),
        ("data.datasets.0.weight=1,5", "Decimals have a point, not a comma: 1.5"),
        ("run.name=123", 'Write it in quotes: "123"'),
        ("data.captions.trigger=true", 'Write it in quotes: "true"'),
        ("method=lora", "For example: {type: "),
        ("validation=null", "or remove it to have its defaults"),
        ("train.max_grad_norm=.inf", "train.max_grad_norm is .inf, but must be a number above 0 or null."),
        ("train.micro_batch_size=8", "must not be above train.global_batch_size, 4: lower it"),
        ("train.warmup_steps=200", "must be below train.steps, 200: lower it"),
    ],
)
def test_the_remedy_fits_the_mistake(config_file: Path, override: str, remedy: str) -> None:
    (problem,) = problems_of(config_file, override)
    assert problem.startswith("command line: ") and remedy in problem


def test_check_of_two_keys_runs_although_a_third_is_wrong(config_file: Path) -> None:
    problems = problems_with(config_file, "steps: 200", "steps: 50\n  weight_decay: -1")
    assert len(problems) == 2
    assert any(
        "train.warmup_steps is 100 (the default), but must be below train.steps, 50" in line for line in problems
    )


def test_key_of_the_other_method_is_told_apart_from_an_unknown_one(config_file: Path) -> None:
    (problem,) = problems_with(config_file, "type: lora", "type: full")
    assert "method.rank is 16, but method.type full has no such key" in problem


def test_unknown_and_missing_method_type(config_file: Path) -> None:
    (problem,) = problems_with(config_file, "type: lora", "type: lola")
    assert ':6: method.type is "lola", but must be' in problem and "lora" in problem
    (problem,) = problems_with(config_file, "  type: lora\n", "")
    assert ":5: method.type is missing" in problem


def test_missing_keys_say_what_to_write(config_file: Path) -> None:
    (problem,) = problems_with(config_file, "  lr: 1e-4\n", "")
    assert problem.startswith(f"{config_file}:15: train.lr is missing") and "For example: lr: 0.0001" in problem
    config_file.write_text("run: {name: x}\n", encoding="utf-8")
    assert [line.split(" is missing")[0] for line in problems_of(config_file)] == [
        f"{config_file}: {section}" for section in ("model", "method", "data", "train")
    ]


@pytest.mark.parametrize("text", ["hf_token: TOP", "hub: {api_key: TOP}", "hub: [{user: me, password: TOP}]"])
def test_a_secret_in_a_config_is_named_by_its_key_alone(text: str, config_file: Path) -> None:
    (problem,) = problems_with(config_file, "run: {name: try}", f"run: {{name: try}}\n{text}")
    assert text.partition(":")[0] in problem and "TOP" not in problem


def test_a_variable_and_its_name_are_told_what_they_may_be(config_file: Path) -> None:
    names = "names there must be text that matches ^[A-Za-z_][A-Za-z0-9_]*$. Rename it."
    assert problems_of(config_file, "slurm.env={AB: 3, A-B: x, C.D: 4, E: y}") == [
        'command line: slurm.env.AB is 3, but must be text that is not empty. Write it in quotes: "3"',
        f'command line: slurm.env has the name "A-B", but {names}',
        f'command line: slurm.env has the name "C.D", but {names}',
        'command line: slurm.env.C.D is 4, but must be text that is not empty. Write it in quotes: "4"',
    ]
    (problem,) = problems_with(config_file, "run: {name: try}", "run: {name: try}\nslurm:\n  env:\n    A-B: x")
    assert problem == f'{config_file}:5: slurm.env has the name "A-B", but {names}'
