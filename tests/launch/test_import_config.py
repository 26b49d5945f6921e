"""`fluxfill import-config` as a user runs it."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from launch.cli import app
from tests.configs.legacy.old_files import ALL, SAMPLES, YAML
from tests.ranks import run_ranks

SECRETS = ("hf_Sample", "0123456789abcdef0123456789", "sample-secret", "sample-key-id", "w0rd", "hf_Inside")
LEAKY = """\
job: extension
config:
  name: leaky
  process:
    - type: sd_trainer
      save: {hf_token: hf_SampleSample12, push_to_hub: true}
      logging: {wandb_api_key: 0123456789abcdef0123456789abcdef01234567}
      datasets:
        - {folder_path: "https://me:w0rd@example.org/pictures", controls: [depth, hf_InsideInside1]}
      train: {steps: 10, own: {password: w0rd}}
      model: {name_or_path: "black-forest-labs/FLUX.1-dev"}
"""


def run(*arguments):
    return CliRunner().invoke(app, ["import-config", *map(str, arguments)])


@pytest.mark.parametrize("name", ALL)
def test_a_sample_is_imported_and_no_secret_is_shown_or_written(name, tmp_path):
    new = tmp_path / "new.yaml"
    for arguments in ((SAMPLES / name, "--out", new), (SAMPLES / name, "--out", new, "--force", "--json")):
        result = run(*arguments, "--pictures", 30)
        assert result.exit_code == 0, result.output
        assert not any(secret in result.output + new.read_text() for secret in SECRETS)
    load_config(new)
    content = json.loads(result.stdout)
    assert "valid" in result.stderr and "What the old run really did" in result.stderr
    table = run(SAMPLES / name, "--out", new, "--force", "--pictures", 30).stdout
    assert f"The {len(content['keys'])} keys of" in table
    assert all(len(line) <= 160 for line in table.splitlines() if line.startswith(("│", "┃")))


def test_a_config_full_of_secrets_names_their_keys_alone(tmp_path):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(LEAKY)
    result = run(old, "--out", new, "--json")
    assert result.exit_code == 0
    everything = result.output + new.read_text() + run(old, "--out", new, "--force").output
    assert not any(secret in everything for secret in SECRETS)
    dropped = [
        line["key"].rpartition(".")[2] for line in json.loads(result.stdout)["keys"] if "secret" in line["verdict"]
    ]
    assert dropped == ["hf_token", "wandb_api_key", "folder_path", "controls", "password"]
    old.write_text(LEAKY.replace("steps: 10", "steps: [hf_InsideInside1"))
    broken = run(old, "--out", new, "--force")
    assert broken.exit_code == 2 and "is not YAML" in broken.stderr
    assert not any(secret in broken.output for secret in SECRETS)


def test_what_is_missing_is_said_aloud_and_the_file_is_written_all_the_same(tmp_path):
    new = tmp_path / "new.yaml"
    result = run(SAMPLES / "finetune.yaml", "--out", new)
    assert result.exit_code == 0
    assert "STILL TO FILL IN" in result.stdout and "- train.steps: pictures x 20 epochs / 8" in result.stdout
    assert "train.steps is null" in result.stdout
    assert result.stdout.endswith(f"next:  fluxfill train {new}  # once they are filled in\n")
    assert re.search(r"^# FILL IN train\.steps", new.read_text(), re.MULTILINE)


def test_pictures_of_folders_that_are_here_are_counted(tmp_path):
    source = tmp_path / "source" / "below"
    source.mkdir(parents=True)
    for number in range(5):
        (source / f"{number}.JPG").touch()
        (source / f"{number}.txt").touch()
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text((SAMPLES / "finetune.yaml").read_text().replace("/data/holed", str(source.parent)))
    assert run(old, "--out", new, "--pictures", 1000).exit_code == 0
    assert load_config(new).train.steps == 20  # 20 epochs of 5 pictures, 8 an update


def test_a_config_whose_weights_count_no_pictures_is_not_called_valid(tmp_path):
    job = "job: extension\nconfig:\n  name: a\n  process:\n  - type: sd_trainer\n    train: {steps: 9}\n    datasets:\n"
    job += "    - {folder_path: /a, num_repeats: 7}\n    - {folder_path: /b}\n"
    job += "    model: {name_or_path: black-forest-labs/FLUX.1-dev}\n"
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(job)
    result = run(old, "--out", new)
    load_config(new)
    assert f"STILL TO FILL IN in {new}" in result.stdout and ": valid" not in result.stdout
    assert "weight of a is 7, but must be the number of its pictures x 7" in result.stdout
    assert ": valid" in run(old, "--out", new, "--force", "--pictures", 3).stdout


def test_no_file_is_replaced_unless_it_is_said_and_the_old_one_never(tmp_path):
    new = tmp_path / "new.yaml"
    new.write_text("mine")
    result = run(SAMPLES / "full.yaml", "--out", new)
    assert result.exit_code == 2 and "--force" in result.stderr and new.read_text() == "mine"
    assert run(SAMPLES / "full.yaml", "--out", new, "--force").exit_code == 0
    assert new.read_text() != "mine"
    old = shutil.copy(SAMPLES / "full.yaml", tmp_path / "old.yaml")
    result = run(old, "--out", old, "--force")
    assert result.exit_code == 2 and "is the old config itself" in result.stderr
    assert Path(old).read_text() == (SAMPLES / "full.yaml").read_text()


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "there is no such file"),
        ("", "the file is empty"),
        ("just text", "holds no keys with values"),
        ("job: generate\nconfig: {process: [{type: to_folder}]}", "type to_folder"),
        ("config: {name: a, process: [{type: sd_trainer, train: {steps: many}}]}", "train.steps is many"),
        ("config: {name: a, process: [{type: sd_trainer, training_folder: '${NOWHERE_SET}'}]}", "NOWHERE_SET"),
    ],
)
def test_bad_input_is_a_message_and_leaves_nothing(tmp_path, text, message):
    if text is not None:
        (tmp_path / "old.yaml").write_text(text)
    result = run(tmp_path / "old.yaml", "--out", tmp_path / "new.yaml")
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "new.yaml").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    result = run(SAMPLES / "full.yaml", "--out", tmp_path / "none" / "new.yaml")
    assert result.exit_code == 2 and "cannot be written" in result.stderr


def train(arguments: list[str]) -> int:
    """The trainer, in a forked rank."""
    from trainer.main import train

    return train(arguments)


@pytest.fixture(scope="module")
def few_triples(triples, tmp_path_factory):
    """Ten of the demo's triples, in target/, source/ and mask/."""
    folder = tmp_path_factory.mktemp("few")
    for target in sorted((triples / "target").glob("*.png"))[::9][:10]:
        for role in ("target", "source", "mask"):
            (folder / role).mkdir(exist_ok=True)
            shutil.copy(triples / role / target.name, folder / role)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", YAML)
def test_an_imported_sample_is_checked_clean_and_trains(name, tmp_path, few_triples, tiny_model, tiny_dev_model):
    from rich.console import Console

    from data.preprocessing.run import preprocess

    new = tmp_path / "new.yaml"
    assert run(SAMPLES / name, "--out", new, "--pictures", 30).exit_code == 0
    config = load_config(new)
    base = tiny_dev_model if config.model.base.endswith("FLUX.1-dev") else tiny_model
    overrides = [f"model.base={base}", f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path}", "run.name=run"]
    overrides += ["data.resolution=64", "data.captions.text_length=32", "data.holdout=2", "train.steps=2"]
    overrides += ["train.warmup_steps=0", "validation.images=1", "validation.sampler_steps=2", "train.compile=off"]
    for place, dataset in enumerate(config.data.datasets):
        overrides.append(f"data.datasets.{place}.target={few_triples / 'target'}")
        if dataset.source is not None:
            overrides.append(f"data.datasets.{place}.source={few_triples / 'source'}")
        if isinstance(dataset.mask, Path):
            overrides.append(f"data.datasets.{place}.mask={few_triples / 'mask'}")
        elif dataset.mask is not None and dataset.mask.folder is not None:
            overrides.append(f"data.datasets.{place}.mask.folder={few_triples / 'mask'}")
    checked = CliRunner().invoke(app, ["check", str(new), *overrides, "--no-steps", "--json"])
    assert checked.exit_code == 0, checked.output
    assert {line["state"] for line in json.loads(checked.stdout)["checks"]} <= {"ok", "warning", "skipped"}
    preprocess(load_config(new, overrides), Console(quiet=True))
    assert run_ranks("single", 1, train, ["--config", str(new), *overrides]) == [2]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in steps)
    assert [line["samples"] for line in steps] == [number * config.train.global_batch_size for number in (1, 2)]
