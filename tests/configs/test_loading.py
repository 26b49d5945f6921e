from pathlib import Path

import pytest

from configs.errors import InputError
from configs.loading import dump_config, json_schema, load_config
from configs.problems import dotted_keys
from configs.schema import Config, FullConfig, LoraConfig
from configs.suggest import REMOVED

VALID = """\
version: 1
run: {name: try}
model:
  base: some/model
method:
  type: lora
  rank: 16
data:
  cache: cache
  datasets:
    - name: a
      target: t
      mask: m
    - {name: b, target: t2, mask: m2}
train:
  steps: 200
  global_batch_size: 4
  lr: 1e-4
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID, encoding="utf-8")
    return path


def problems_of(path: Path | str, *overrides: str) -> list[str]:
    """The lines of the error that loading ends in."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def problems_with(path: Path, old: str, new: str) -> list[str]:
    """The lines of the error after one change to the valid file."""
    assert old in VALID
    path.write_text(VALID.replace(old, new), encoding="utf-8")
    return problems_of(path)


def test_file_becomes_a_config(config_file: Path) -> None:
    config = load_config(config_file)
    assert isinstance(config, Config)
    assert config.train.lr == 1e-4
    assert [dataset.name for dataset in config.data.datasets] == ["a", "b"]


def test_overrides_reach_sections_list_entries_and_absent_keys(config_file: Path) -> None:
    config = load_config(
        str(config_file),
        [
            "train.lr=5e-5",
            "data.resolution=[512,768]",
            "method.rank=8",
            "data.datasets.1.weight=2",
            "flow.shift=none",
            "validation.every_steps=null",
            "data.captions.default=a = b",
            "train.lr=6e-5",
        ],
    )
    assert config.train.lr == 6e-5
    assert config.data.resolution == [512, 768]
    assert isinstance(config.method, LoraConfig) and config.method.rank == 8
    assert [dataset.weight for dataset in config.data.datasets] == [1.0, 2.0]
    assert config.flow.shift == "none"
    assert config.validation.every_steps is None
    assert config.data.captions.default == "a = b"


def test_override_replaces_a_whole_section(config_file: Path) -> None:
    assert load_config(config_file, ["method={type: full}"]).method == FullConfig(type="full")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", ".0001", "0.0001", "1.0e-4"])
def test_every_way_to_write_a_number_is_a_number(config_file: Path, text: str) -> None:
    config_file.write_text(VALID.replace("1e-4", text), encoding="utf-8")
    assert load_config(config_file).train.lr == 1e-4
    assert load_config(config_file, [f"train.lr={text}"]).train.lr == 1e-4


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "24:00", "2026-01-31", "1_000", "="])
def test_words_that_older_yaml_rewrote_stay_text(config_file: Path, text: str) -> None:
    assert load_config(config_file, [f"data.captions.trigger={text}"]).data.captions.trigger == text


def test_leading_zero_is_not_octal(config_file: Path) -> None:
    assert load_config(config_file, ["train.global_batch_size=010"]).train.global_batch_size == 10


@pytest.mark.parametrize("text", ["yes", "on", "no", "off", "1"])
def test_only_true_and_false_are_booleans(config_file: Path, text: str) -> None:
    (problem,) = problems_of(config_file, f"train.activation_checkpointing={text}")
    assert "must be auto, true or false" in problem


def test_every_problem_is_reported_at_once_with_its_line(config_file: Path) -> None:
    text = (
        VALID.replace("steps: 200", "steps: abc").replace("base: some/model", "bse: x").replace("rank: 16", "rank: 0")
    )
    config_file.write_text(text + "  lr: 2\nlogging: {trackers: wandb}\n", encoding="utf-8")
    problems = problems_of(config_file, "train.max_grad_norm=-1", "nonsense", "data.datasets.5.weight=1")
    starts = {
        problem.partition(" is ")[0].partition(" has ")[0].replace(str(config_file), "FILE") for problem in problems
    }
    assert starts == {
        "FILE:19: train.lr",
        "FILE:16: train.steps",
        "FILE:3: model.base",
        "FILE:4: model.bse",
        "FILE:7: method.rank",
        "FILE:20: logging.trackers",
        "command line: train.max_grad_norm",
        "command line: 'nonsense'",
        "command line: 'data.datasets.5.weight=1': data.datasets",
    }


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


def test_keys_of_earlier_releases_are_passed_over_in_a_checkpoints_config(config_file: Path) -> None:
    config = load_config(config_file)
    config_file.write_text(config_file.read_text() + "checkpoint: {requantize: true}\n")
    assert load_config(config_file, saved_by_a_run=True) == config
    assert not REMOVED.keys() & set(dotted_keys(json_schema()))


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


def test_key_given_twice_names_both_lines(config_file: Path) -> None:
    (problem,) = problems_with(config_file, "  cache: cache\n", "  cache: cache\n  cache: other\n")
    assert problem == f"{config_file}:10: data.cache is given twice, first on line 9: keep one of the two."
    (problem,) = problems_with(config_file, "run: {name: try}", "run: {name: try, name: again}")
    assert problem == f"{config_file}:2: run.name is given twice, on the same line: keep one of the two."


def test_newer_version_is_named_and_nothing_else_is_judged(config_file: Path) -> None:
    problems = problems_with(config_file, "version: 1\n", "version: 2\nnew_section: 1\n")
    assert len(problems) == 1
    assert ":1: version is 2, but this fluxfill reads configs of version 1. Upgrade fluxfill" in problems[0]


@pytest.mark.parametrize("version", ["true", "'1'", "1.0", "0", "null"])
def test_version_is_exactly_one(config_file: Path, version: str) -> None:
    (problem,) = problems_with(config_file, "version: 1", f"version: {version}")
    assert ":1: version is" in problem and "must be 1" in problem


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"# nothing but a comment\n", "the file is empty"),
        (b"[1, 2]", "the file holds [1, 2], not keys with values"),
        (b"just text", 'the file holds "just text", not keys'),
        (b"run: [1\n", "2: is not YAML"),
        (b"run:\n\tname: x\n", "2: is not YAML"),
        (b"a: b: c\n", "1: is not YAML"),
        (b"a: \x00\n", "is not YAML"),
        (b"run: {name: \xff}", "is not UTF-8"),
        (b"---\na: 1\n---\nb: 2\n", "is not YAML"),
        (b"[" * 5000, "nested too deeply"),
        (b"run: &run {name: *run}\n", "contains itself"),
        (b"run: !!python/object:os.system {}\n", "cannot be read as"),
        (b"? [a, b]\n: c\n", "a key that is not plain text"),
    ],
)
def test_file_that_is_no_config_is_an_input_error(config_file: Path, content: bytes, message: str) -> None:
    config_file.write_bytes(content)
    problems = problems_of(config_file)
    assert str(config_file) in problems[0] and message in problems[0]


def test_missing_file_and_folder_are_input_errors(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "nowhere.yaml")
    assert "there is no such file" in problem
    (problem,) = problems_of(tmp_path)
    assert "cannot be read" in problem


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lr", "is not key=value"),
        ("=3", "is not key=value"),
        ("train..lr=3", "is not key=value"),
        ("train.lr=[", "not YAML"),
        ("train.lr=@x", "Put text in quotes"),
        ("train.lr.x=3", "train.lr is 0.0001 and has no keys"),
        ("data.datasets.2.name=x", "a list with the entries 0 to 1, not 2"),
        ("data.datasets.first.name=x", "a list with the entries 0 to 1, not first"),
        ("run={name: a, name: b}", "name is given twice"),
    ],
)
def test_override_that_cannot_be_applied_is_explained(config_file: Path, override: str, message: str) -> None:
    (problem,) = problems_of(config_file, override)
    assert problem.startswith("command line: ") and override in problem and message in problem


def test_override_can_mend_the_file(config_file: Path) -> None:
    config_file.write_text(
        VALID.replace("steps: 200", "steps: abc").replace("run: {name: try}", "run:"), encoding="utf-8"
    )
    config = load_config(config_file, ["train.steps=300", "run.name=mended"])
    assert (config.train.steps, config.run.name) == (300, "mended")


def test_dumped_config_reads_back_equal(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["flow.shift=3", "train.ema_decay=0.9999", "run.seed=9223372036854775807"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


NASTY_TEXTS = [
    "",
    " ",
    "no",
    "~",
    "null",
    "1e-4",
    ".5",
    "010",
    "0o17",
    "1_000",
    "12:30",
    "2026-01-31",
    "a: b",
    "- x",
    "#1",
]
NASTY_TEXTS += ["{", "'", '"', "=", "<<", "!x", "&a", "a\nb", "é 中", "x" * 300]


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_any_text_survives_dump_and_load(config_file: Path, tmp_path: Path, text: str) -> None:
    config = load_config(config_file)
    captions = config.data.captions.model_copy(update={"default": text})
    config = config.model_copy(update={"data": config.data.model_copy(update={"captions": captions})})
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again).data.captions.default == text
