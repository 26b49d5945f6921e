from pathlib import Path

import pytest
import yaml

from configs.errors import InputError
from configs.loading import dump_config, load_config
from configs.schema import Config, FullConfig, LoraConfig
from tests.configs.run_file import VALID, problems_of, problems_with


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


@pytest.mark.fault(18, "several mistakes in one file and on the command line")
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


@pytest.mark.fault(18, "files that are missing, folders, other formats")
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


def test_a_dumped_config_holds_no_signature_of_a_url(config_file: Path, tmp_path: Path) -> None:
    """What a run stores is shown to others; a text that only looks like one stays."""
    tars = "data.datasets.0={name: a, tars: ['https://host/a.tar?X-Amz-Signature=TOP', s3://b/c.tar], mask: null}"
    config = load_config(config_file, [tars, "data.captions.default='why: what? when?'"])
    assert config.data.datasets[0].tars == ["https://host/a.tar?X-Amz-Signature=TOP", "s3://b/c.tar"]
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    data = load_config(again).data
    assert data.datasets[0].tars == ["https://host/a.tar", "s3://b/c.tar"]
    assert data.captions == config.data.captions


def test_keys_of_earlier_releases_are_passed_over_in_a_checkpoints_config(config_file: Path) -> None:
    config = load_config(config_file)
    config_file.write_text(config_file.read_text() + "checkpoint: {requantize: true}\n")
    assert load_config(config_file, saved_by_a_run=True) == config


def test_defaults_of_earlier_releases_are_passed_over_where_they_say_nothing(config_file: Path) -> None:
    """A run writes its config with all defaults; a dataset of folders has no members, whatever their defaults were."""
    config = load_config(config_file)
    saved = yaml.safe_load(dump_config(config))
    for dataset in saved["data"]["datasets"]:
        assert dataset["tars"] is None and dataset["table"] is None
        dataset |= {"members": {"target": ["t.png"]}, "columns": {"target": "of-old"}}
    config_file.write_text(yaml.safe_dump(saved))
    assert load_config(config_file, saved_by_a_run=True) == config
    with pytest.raises(InputError, match="remove members"):
        load_config(config_file)


@pytest.mark.parametrize("data", ["data:", "data: []", "data: {datasets: {}}", "data: {datasets: [x]}"])
def test_a_damaged_config_of_a_checkpoint_is_refused_not_stumbled_over(config_file: Path, data: str) -> None:
    head, _, _ = VALID.partition("data:")
    config_file.write_text(f"{head}{data}\ncheckpoint:\n", encoding="utf-8")
    with pytest.raises(InputError, match="data"):
        load_config(config_file, saved_by_a_run=True)


def test_problems_are_in_the_order_of_the_lines_and_then_of_the_command_line(config_file: Path) -> None:
    """Whatever finds them: the parser, the schema or an override."""
    text = VALID.replace("cache: cache", "cache: cache\n  cache: other").replace("rank: 16", "rank: many")
    config_file.write_text(text.replace("lr: 1e-4", "lr: -1") + "nothing: 1\nnothing: 2\nrun: {name: again}\n")
    problems = problems_of(config_file, "train.steps=-1", "run.name")
    lines = [int(problem.split(":")[1]) for problem in problems if problem.startswith(str(config_file))]
    assert lines == sorted(lines) and len(lines) == 6, problems
    assert [problem.split(":")[0] for problem in problems[6:]] == ["command line"] * 2
    config_file.write_text(VALID.replace("run: {name: try}\n", "").replace("rank: 16", "rank: many"))
    assert [problem.split(" ")[1] for problem in problems_of(config_file)] == ["method.rank", "run"]


@pytest.mark.parametrize("key", ["train.ema_decay", "slurm.time", "train"])
def test_nothing_behind_the_equals_sign_is_no_null(config_file: Path, key: str) -> None:
    """It is a variable of the shell that is not set, more often than a wish for none."""
    (problem,) = problems_of(config_file, f"{key}=")
    assert f'{key} is "", but must be' in problem
