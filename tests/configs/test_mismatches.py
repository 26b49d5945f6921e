from pathlib import Path

from configs.combinations import KEYS
from configs.mismatches import EXAMPLE
from configs.schema import Config
from tests.configs.run_file import VALID, problems_of

FOUR = f"""\
{VALID}  optimizer: adam
  warmup_steps: 5000
parallel: {{engine: zero3}}
validation: {{weights: ema}}
"""
ZERO3_AND_INT8 = "model.precision int8 and parallel.engine zero3 do not go together"
NO_AVERAGE = "validation.weights is ema, but train.ema_decay is null"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_mistakes_of_every_kind_are_listed_at_once(config_file: Path) -> None:
    write(config_file, FOUR.replace("base: some/model", "base: some/model\n  precision: int8"))
    told = [
        ('20: train.optimizer is "adam"', "Did you mean adamw?"),
        ("21: train.warmup_steps is 5000, but must be below train.steps, 200", "raise the steps."),
        (f"22: {ZERO3_AND_INT8}", "of a quantized weight."),  # and nothing nearest, which no adam was tried with
        (f"23: {NO_AVERAGE}", "or validation.weights=live."),
    ]
    problems = problems_of(config_file)
    assert len(problems) == len(told)
    for problem, (start, end) in zip(problems, told, strict=True):
        assert problem.startswith(f"{config_file}:{start}") and problem.endswith(end)


def test_every_rule_against_a_combination_is_told(config_file: Path) -> None:
    asked = ["train.optimizer=prodigy", "train.lr=1", "model.precision=nf4", "parallel.engine=zero3"]
    problems = problems_of(config_file, *asked, "slurm.time=10", "flow.keep_target=base", "validation.weights=ema")
    pairs = ["train.optimizer prodigy and parallel.engine zero3", "model.precision nf4 and parallel.engine zero3"]
    assert [any(pair in problem for problem in problems) for pair in pairs] == [True, True]
    assert any(NO_AVERAGE in problem for problem in problems)
    assert not any("keep_target" in problem for problem in problems)  # of an adapter it is right
    cures = {problem.partition("Nearest that works: ")[2] for problem in problems if "go together" in problem}
    (cure,) = cures
    problems = problems_of(config_file, *asked, *cure.removesuffix(".").split(", "), "validation.weights=ema")
    assert len(problems) == 1 and NO_AVERAGE in problems[0]


def test_a_wrong_key_is_held_against_no_other(config_file: Path) -> None:
    (problem,) = problems_of(config_file, "train.optimizer=prodigi", "train.lr=1", "parallel.engine=zero3")
    assert "Did you mean prodigy?" in problem
    (problem,) = problems_of(config_file, "model.precision=int8", "parallel.engine=zero33")
    assert "parallel.engine is" in problem
    (problem,) = problems_of(config_file, "train.ema_decay=high", "validation.weights=ema")
    assert "train.ema_decay is" in problem
    (problem,) = problems_of(config_file, "method={type: ful}", "model.precision=int8")
    assert "method.type is" in problem


def test_a_misspelt_key_may_be_any_that_is_not_written(config_file: Path) -> None:
    (problem,) = problems_of(config_file, "train.ema_decy=0.999", "validation.weights=ema")
    assert "Did you mean train.ema_decay?" in problem
    (problem,) = problems_of(config_file, "trian={ema_decay: 0.999}", "validation.weights=ema")
    assert "there is no such key" in problem
    problems = problems_of(config_file, "train.ema_decy=0.999", "parallel.engine=zero3", "model.precision=int8")
    assert len(problems) == 2 and any(ZERO3_AND_INT8 in problem for problem in problems)


def test_what_is_missing_or_wrong_by_default_hides_nothing(config_file: Path) -> None:
    write(config_file, FOUR.replace("  steps: 200\n", "").replace("  optimizer: adam\n  warmup_steps: 5000\n", ""))
    problems = problems_of(config_file, "data.datasets.0.weight=-1", "data.datasets.1=3")
    assert len(problems) == 4 and any(NO_AVERAGE in problem for problem in problems)
    write(config_file, VALID.replace("steps: 200", "steps: 50"))
    problems = problems_of(config_file, "validation.weights=ema")
    assert len(problems) == 2
    assert any("warmup_steps is 100 (the default)" in problem for problem in problems)
    assert any(NO_AVERAGE in problem for problem in problems)


def test_keys_of_another_method_hide_nothing_and_cause_nothing(config_file: Path) -> None:
    problems = problems_of(config_file, "method.type=dorra", "method.factor=2", "validation.weights=ema")
    assert len(problems) == 2 and any(NO_AVERAGE in problem for problem in problems)


def test_the_nearest_that_works_is_told_where_all_that_it_depends_on_is_known(config_file: Path) -> None:
    """Taken together, what two messages say to write would be refused."""
    of_engine = ("parallel.engine=zero3", "model.precision=int8")
    for wrong in ("train.optimizer=prodigi", "method={type: ful}"):
        mismatch, other = sorted(problems_of(config_file, *of_engine, wrong), key=lambda told: "Did you" in told)
        assert ZERO3_AND_INT8 in mismatch and "Nearest" not in mismatch and "Did you mean" in other
    mismatch = next(told for told in problems_of(config_file, *of_engine, "train.lr=-1") if ZERO3_AND_INT8 in told)
    assert "Nearest that works: parallel.engine=" in mismatch


def test_the_example_holds_what_must_be_given_and_nothing_that_is_judged() -> None:
    Config.model_validate(EXAMPLE)
    for name, section in EXAMPLE.items():
        assert Config.model_fields[name].is_required()
        judged = {key for key in section if f"{name}.{key}" in KEYS.values()}
        assert judged <= {"type"}
