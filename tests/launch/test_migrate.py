import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from configs.errors import InputError
from configs.loading import load_config
from data.migrate.report import read_report
from demo.old_folders import Planted, make_old_folders
from launch.cli import app
from launch.command import REPO_ROOT

RECIPE = (REPO_ROOT / "configs" / "fill_lora.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    return make_old_folders(tmp_path_factory.mktemp("old"))


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def migrate(planted: Planted, out: Path, *options: object):
    folders = ["--target", planted.target, "--mask", planted.mask, "--source", planted.masked]
    return CliRunner().invoke(app, ["migrate", *map(str, [*folders, "--out", out, *options])])


def test_help_says_what_the_masked_pictures_are():
    result = CliRunner().invoke(app, ["migrate", "--help"])
    assert result.exit_code == 0 and "Example: fluxfill migrate --target" in result.output
    text = " ".join(result.output.split())
    assert "`masked_images`" in text and "in the grey that FLUX.1 Fill expects" in text


def test_a_migration_ends_with_a_summary_a_report_and_an_edited_config(planted, config, tmp_path):
    before = {path: path.read_bytes() for path in planted.target.parent.rglob("*") if path.is_file()}
    result = migrate(planted, tmp_path / "new", "--config", config)
    assert result.exit_code == 0, result.output
    report = read_report(tmp_path / "new" / "report.json")
    kept, quarantined = len(report.kept), len(report.quarantined)
    assert kept > quarantined > 10
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    for line in (
        f"{quarantined} of {kept + quarantined} triples in quarantine:",
        f"triples {kept + quarantined}",
        f"kept {kept}, hard-linked",
        f"in quarantine {quarantined}, each with its reason in the report",
        f"hole {report.hole}",
        f"report {tmp_path / 'new' / 'report.html'}",
        f"{config}: changed:",
        f"fluxfill check {config}",
        f"fluxfill train {config}",
    ):
        assert line in lines
    for problem in {problem for triple in report.quarantined for problem in triple.problems}:
        assert f"{problem}" in lines
    assert (tmp_path / "new" / "report.html").stat().st_size > 100_000
    assert before == {path: path.read_bytes() for path in planted.target.parent.rglob("*") if path.is_file()}

    edited = config.read_text(encoding="utf-8")
    assert [line for line in RECIPE.splitlines() if line not in edited.splitlines()] == []
    names = [dataset.name for dataset in load_config(config).data.datasets]
    assert names == ["triples", *(entry["name"] for entry in report.datasets)]

    again = migrate(planted, tmp_path / "new", "--config", config)
    assert again.exit_code == 0 and "has the datasets already" in again.output
    assert config.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize("is_of", ["an earlier migration", "the old folders"])
def test_datasets_whose_place_the_new_ones_take_leave_the_config(planted, config, tmp_path, is_of):
    new = tmp_path / "new"
    folders = (planted.target, planted.mask) if is_of == "the old folders" else (new / "target", new / "mask")
    place = f"    - {{name: migrated, target: {folders[0]}, mask: {folders[1]}}}\n"
    config.write_text(RECIPE.replace("  resolution:", f"{place}  resolution:"), encoding="utf-8")
    result = migrate(planted, new, "--config", config, "--name", "sofas")
    assert result.exit_code == 0, result.output
    names = [dataset.name for dataset in load_config(config).data.datasets]
    assert names == ["triples", "sofas-with_mask", "sofas-with_source"]


def test_a_second_set_does_not_take_the_place_of_a_first_of_the_same_name(planted, config, tmp_path):
    assert migrate(planted, tmp_path / "first", "--config", config).exit_code == 0
    edited = config.read_text(encoding="utf-8")
    other = make_old_folders(tmp_path / "other")
    result = migrate(other, tmp_path / "second", "--config", config)
    assert result.exit_code == 2
    assert f"migrated-with_mask is there already, of {tmp_path / 'first' / 'target'}" in result.stderr
    assert "another --name" in result.stderr and config.read_text(encoding="utf-8") == edited
    assert migrate(other, tmp_path / "second", "--config", config, "--name", "second").exit_code == 0
    assert [each.name for each in load_config(config).data.datasets][1:] == [
        *("migrated-with_mask", "migrated-with_source"),
        *("second-with_mask", "second-with_source"),
    ]


IMPORTED = """
output_name = "sofa"
network_module = "networks.lora_flux"
pretrained_model_name_or_path = "black-forest-labs/FLUX.1-dev"
max_train_epochs = 2
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "{target}"
num_repeats = 7
flip_aug = true
alpha_mask = true
[[datasets.subsets]]
image_dir = "/nowhere/rooms"
conditioning_data_dir = "/nowhere/masks"
"""


@pytest.mark.parametrize("steps", [900, None])
def test_a_config_that_was_imported_gets_the_masks_that_it_lacks(tmp_path, steps):
    """The walk of docs/guide.md: import-config leaves values to be filled in, and migrate makes the masks of them."""
    target = tmp_path / "old" / "target"
    target.mkdir(parents=True)
    for number in range(3):
        picture = Image.effect_noise((96, 96), 40 + 20 * number).convert("RGB")
        opaque = Image.new("L", picture.size, 255)
        opaque.paste(0, (10, 20, 50, 60))
        picture.putalpha(opaque)
        picture.save(target / f"{number}.png")
    text = IMPORTED.format(target=target)
    text = text if steps is None else text.replace("max_train_epochs = 2", f"max_train_steps = {steps}")
    old, new = tmp_path / "old.toml", tmp_path / "new.yaml"
    old.write_text(text)
    imported = CliRunner().invoke(app, ["import-config", str(old), "--out", str(new)])
    assert f"--config {new}" in imported.output
    with pytest.raises(InputError, match=r"data\.datasets\.0\.mask is null"):
        load_config(new)

    out = tmp_path / "dataset"
    result = CliRunner().invoke(app, ["migrate", "--target", str(target), "--out", str(out), "--config", str(new)])
    assert result.exit_code == 0, result.output
    assert "mask is null" not in result.output
    assert f"STILL TO FILL IN in {new} before it runs:" in result.output
    assert (steps is None) == ("train.steps is null" in result.output)
    assert "weight of rooms is 1, but must be the number of its pictures x 1" in result.output
    assert "migrated: weight 21, pictures x repeats" in result.output and "weight of target" not in result.output
    head = new.read_text().partition("version:")[0]
    assert "data.datasets.0.mask" not in head
    assert ("FILL IN train.steps" in head) == ("have to be filled in" in head) == (steps is None)
    config = load_config(new, [] if steps else ["train.steps=5"])
    assert [each.name for each in config.data.datasets] == ["rooms", "migrated"]
    migrated = config.data.datasets[1]
    assert (migrated.mask, migrated.flip, migrated.weight) == (out / "mask", True, 21.0)

    new.write_text(new.read_text().replace("weight: 1.0 # the", "weight: 40 # the"))
    again = CliRunner().invoke(app, ["migrate", "--target", str(target), "--out", str(out), "--config", str(new)])
    assert "has the datasets already" in again.output and "weight of" not in again.output
    assert load_config(new, [] if steps else ["train.steps=5"]).data.datasets[1].weight == 21.0


def test_two_datasets_share_what_the_one_had_whose_place_they_take(planted, config, tmp_path):
    old = f"{{name: old, target: {planted.target}, mask: {{folder: {planted.mask}, label: 1, dilate: [0, 8]}}"
    place = f"    - {old}, flip: true, check_masks: warn, weight: 5}}\n"
    config.write_text(RECIPE.replace("  resolution:", f"{place}  resolution:"), encoding="utf-8")
    new = tmp_path / "new"
    result = migrate(planted, new, "--config", config)
    assert result.exit_code == 0, result.output
    _, *datasets = load_config(config).data.datasets
    kept = read_report(new / "report.json").kept
    sources = sum(triple.keeps_source for triple in kept)
    assert [each.weight for each in datasets] == pytest.approx(
        [5 * (len(kept) - sources) / len(kept), 5 * sources / len(kept)], rel=1e-5
    )
    for each, folder in zip(datasets, ("with_mask", "with_source"), strict=True):
        assert (each.flip, each.check_masks) == (True, "warn")
        assert (each.mask.folder, each.mask.dilate, each.mask.label) == (new / "mask" / folder, [0, 8], None)
        assert f"{each.name}: weight {each.weight:g}, of the 5 of old" in result.output
    again = migrate(planted, new, "--config", config)
    assert "has the datasets already" in again.output


def test_a_config_keeps_its_mode_and_a_link_to_it_stays_a_link(planted, config, tmp_path):
    config.chmod(0o600)
    link = tmp_path / "link.yaml"
    link.symlink_to(config)
    assert migrate(planted, tmp_path / "new", "--config", link).exit_code == 0
    assert link.is_symlink() and len(load_config(config).data.datasets) == 3
    assert config.stat().st_mode & 0o777 == 0o600


def test_a_dry_run_writes_the_page_alone(planted, config, tmp_path):
    result = migrate(planted, tmp_path / "new", "--config", config, "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"{config}: would change:" in result.output and "without --dry-run writes the dataset" in result.output
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    assert config.read_text(encoding="utf-8") == RECIPE
    assert migrate(planted, tmp_path / "new").exit_code == 0


def test_without_a_config_the_entry_is_printed(planted, tmp_path):
    result = migrate(planted, tmp_path / "new", "--copy", "--trigger", "sks")
    assert "  - name: migrated-with_mask\n    target: " in result.output
    assert "fluxfill check CONFIG.yaml" in result.output
    report = read_report(tmp_path / "new" / "report.json")
    assert report.how == "copy" and all(triple.caption.startswith("sks") for triple in report.kept)


def test_nothing_usable_ends_with_2(planted, config, tmp_path):
    shutil.copytree(planted.target, tmp_path / "target")
    for path in (tmp_path / "target").rglob("*.*"):
        path.write_bytes(b"no picture")
    result = CliRunner().invoke(
        app, ["migrate", "--target", f"{tmp_path}/target", "--out", f"{tmp_path}/new", "--config", str(config)]
    )
    assert result.exit_code == 2 and "Nothing can be trained on yet." in result.output
    assert config.read_text(encoding="utf-8") == RECIPE


@pytest.mark.parametrize(
    "options, message",
    [
        (["--target", "old"], "Missing option '--out'"),
        (["--target", "nowhere", "--out", "new"], "--target nowhere does not exist"),
        (["--target", "old", "--out", "new", "--copy", "--link"], "--copy and --link exclude each other"),
        (["--target", "old", "--out", "new", "--name", "a b"], "--name a b: give letters, digits"),
        (["--target", "old", "--out", "new", "--config", "no.yaml"], "no.yaml: there is no such file"),
        (["--target", "old", "--out", "new", "--config", "other.yaml"], "other.yaml:1: process is"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "other.yaml").write_text("process: [{type: sd_trainer}]\n")
    result = CliRunner().invoke(app, ["migrate", *options])
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_a_message(planted, tmp_path):
    out = tmp_path / "new"
    (out / "looks.jsonl").mkdir(parents=True)
    result = migrate(planted, out)
    assert result.exit_code == 2
    assert f"--out {out}: cannot be written ({out / 'looks.jsonl'}: Is a directory)" in result.stderr


def test_a_disk_that_fails_while_a_file_is_open_is_a_message(planted, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("data.migrate.run.look_at", fail)
    result = migrate(planted, tmp_path / "new")
    assert result.exit_code == 2
    assert f"--out {tmp_path / 'new'}: cannot be written (Input/output error)" in result.stderr


def test_interrupted_it_says_that_the_same_command_goes_on(planted, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.migrate.run.look_at", interrupt)
        result = migrate(planted, tmp_path / "new")
    assert result.exit_code == 130 and "The same command goes on from here." in result.output
    assert migrate(planted, tmp_path / "new").exit_code == 0


def test_it_runs_as_a_module_without_torch(planted, tmp_path):
    code = "import runpy, sys\ntry: runpy.run_module('launch.cli', run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    options = ["migrate", "--target", planted.target, "--out", tmp_path / "new", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *options], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_on_a_terminal_the_path_of_the_report_can_be_clicked(planted, tmp_path, monkeypatch):
    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr("launch.migrate.Console", lambda: console)
    assert migrate(planted, tmp_path / "new").exit_code == 0
    assert f"file://{tmp_path / 'new' / 'report.html'}" in console.export_text(styles=True)


def test_a_list_is_given_as_target_alone(planted, tmp_path):
    rows = [
        {"image": str(target), "mask": str(target.parents[1] / "mask_dir" / f"{target.stem}.png")}
        for target in sorted(planted.target.glob("astronaut_0*.jpg"))
    ]
    assert rows
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = ["migrate", "--target", str(tmp_path / "list.jsonl"), "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    kept = sorted(path.stem for path in (tmp_path / "new" / "target").rglob("*.jpg"))
    assert kept and set(kept) <= {path.stem for path in planted.target.iterdir()}
    result = CliRunner().invoke(app, [*arguments, "--mask", str(planted.mask)])
    assert result.exit_code == 2 and "a table is given as --target alone" in result.output
