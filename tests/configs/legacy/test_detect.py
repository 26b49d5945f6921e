import json
import random

import pytest

from configs.errors import InputError
from configs.legacy import ai_toolkit, kohya_gui, sd_scripts, simpletuner
from configs.legacy.detect import import_file
from configs.legacy.render import render_config, render_json
from configs.yaml_text import parse_yaml
from tests.configs.legacy.old_files import SAMPLES, import_sample


@pytest.mark.parametrize(
    "name, program",
    [
        ("lora_24gb.yaml", "ai-toolkit"),
        ("finetune.yaml", "the `finetune` trainer"),
        ("migrated_80gb.yaml", "ai-toolkit"),
        ("sd_scripts.toml", "sd-scripts"),
        ("sd_scripts_datasets.toml", "sd-scripts"),
        ("simpletuner.json", "SimpleTuner"),
    ],
)
def test_the_program_is_known_by_the_keys(name, program):
    assert import_sample(name).program == program


def test_a_job_may_be_json_and_take_values_from_the_environment(tmp_path):
    job = {
        "job": "extension",
        "config": {
            "name": "a",
            "process": {"type": "ui_trainer", "train": {"steps": "${STEPS}"}, "save": {"t": "${X}"}},
        },
    }
    (tmp_path / "old.json").write_text(json.dumps(job))
    imported = import_file(tmp_path / "old.json", {"STEPS": "12", "X": "y"}, lambda folder: None)
    assert imported.config["train"]["steps"] == 12
    with pytest.raises(InputError, match="not set: STEPS, X"):
        import_file(tmp_path / "old.json", {}, lambda folder: None)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("old.yaml", "- a\n- b\n", "holds no keys with values"),
        ("old.yaml", "just text\n", "holds no keys with values"),
        ("old.yaml", "services: {web: {image: x}}\n", "no config of a program that is known: its keys are services"),
        ("old.yaml", "job: generate\nconfig: {process: [{type: to_folder}]}", r"type to_folder \(job: generate\)"),
        ("old.yaml", "job: train\nconfig: {process: []}", "config.process is no list"),
        ("old.yaml", "job: train\n", "config.process is no list"),
        ("old.yaml", "config: {process: [text]}", "config.process is no list"),
        ("old.yaml", "run: {name: a}\nmodel: {base: b}\n", "is a config of fluxfill already"),
        ("old.json", '[{"id": "a", "type": "local"}]', "datasets alone. Give its config.json"),
        (
            "old.json",
            '{"model_type": "FLUX_DEV_1", "lora_rank": 16, "training_method": "LORA", "base_model_name": "b"}',
            "is a config of OneTrainer, which is not read. Copy configs/fill_lora.yaml",
        ),
        (
            "old.json",
            '{"model_type": "lora", "lora_rank": 16}',
            "no config of a program that is known: its keys are model_type, lora_rank",
        ),
        ("old.json", '{"datasets": null}', "no config of a program that is known: its keys are datasets"),
        ("old.json", '{"datasets": 1}', "no config of a program that is known: its keys are datasets"),
    ],
)
def test_what_is_no_config_says_what_would_be_one(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        import_file(tmp_path / name, {}, lambda folder: None)


def test_sections_that_hold_themselves_are_refused(tmp_path):
    (tmp_path / "old.yaml").write_text("&a {job: x, config: {process: [{type: sd_trainer, x: *a}]}}")
    with pytest.raises(InputError, match=r"old\.yaml:1: a value contains itself: remove the alias"):
        import_file(tmp_path / "old.yaml", {}, lambda folder: None)


SECRET = "hf_0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET}: 1\nother: 2",
        f"job: x\nconfig: {{process: [{{type: {SECRET}}}]}}",
        f"job: {SECRET}\nconfig: {{process: [{{type: x}}]}}",
        f"job: x\nconfig: {{process: [{{type: sd_trainer, {SECRET}: 1}}]}}",
        f"job: x\nconfig: {{process: [{{type: finetune, lr: {{{SECRET}: [1, {SECRET}]}}}}]}}",
        f"job: x\nconfig: {{process: [{{type: sd_trainer, device: [{{{SECRET}: 1}}, 2]}}]}}",
    ],
)
def test_a_secret_is_not_shown_wherever_it_stands(tmp_path, text):
    (tmp_path / "old.yaml").write_text(text)
    try:
        imported = import_file(tmp_path / "old.yaml", {}, lambda folder: None)
        shown = render_json(imported) + render_config(imported, "old.yaml", "new.yaml")
    except InputError as error:
        shown = str(error)
    assert SECRET not in shown


@pytest.mark.parametrize("text", ["a\nrun: {name: taken}", "a\x85b: c", "a\u2028b", "\x1b[31m"])
def test_a_text_of_the_old_config_stays_inside_its_comment(tmp_path, text):
    train = {"optimizer": text, "lr_scheduler": text, text: 1}
    job = {"job": "x", "config": {"name": "mine", "process": [{"type": "sd_trainer", "train": train}]}}
    (tmp_path / "old.json").write_text(json.dumps(job))
    imported = import_file(tmp_path / "old.json", {}, lambda folder: None)
    rendered = parse_yaml(render_config(imported, f"{text}.json", "new.yaml"))
    assert not rendered.problems and rendered.value == imported.config
    assert all(line.key.isprintable() and line.value.isprintable() for line in imported.lines)
    assert all(map(str.isprintable, imported.really_did))


def test_the_file_of_the_datasets_may_be_given(tmp_path):
    for name in ("sd_scripts.toml", "sd_scripts_datasets.toml"):
        (tmp_path / name.replace("_datasets", "-of-mine")).write_text((SAMPLES / name).read_text())
    alone = import_file(tmp_path / "sd_scripts.toml", {}, lambda folder: 30)
    assert "data.datasets.0.target" in alone.fill_in
    given = import_file(tmp_path / "sd_scripts.toml", {}, lambda folder: 30, tmp_path / "sd_scripts-of-mine.toml")
    assert given.config == import_sample("sd_scripts.toml").config


USUAL = [None, 1, 2, "3", True]
VALUES = [None, True, False, 0, 1, -1, 7, 0.5, "x", "1e-4", "", "a/b", [], ["a"], [512, 768], [{"a": 1}], {}, {"a": 1}]


def random_section(draw, names):
    return {name: draw.choice(VALUES if draw.random() < 0.03 else USUAL) for name in names if draw.random() < 0.7}


def random_job(draw, kind):
    names = [name for name in ai_toolkit._NAMES if "*" not in name and "." not in name]
    sections = {
        name: random_section(draw, names) for name in ("network", "train", "model", "save", "sample", "logging")
    }
    sections["train"] |= {name: random_section(draw, names) for name in ("lr_scheduler_params", "ema_config")}
    sections["datasets"] = [random_section(draw, [*names, "resolution", "mask_path"]) for _ in range(draw.randrange(3))]
    kept = {name: section for name, section in sections.items() if draw.random() < 0.9}
    old = [*names, "num_epochs", "target_image_dir", "mask_dir", "resolution", "model_path", "stage2_lr"]
    process = {**random_section(draw, old), "type": kind, **(kept if kind == "sd_trainer" else {})}
    return {"job": "extension", "config": {"name": draw.choice(["a", 5, None]), "process": [process]}}


def random_arguments(draw, known, more):
    names = [name for name in (*known, *more) if "*" not in name and "?" not in name]
    return random_section(draw, names)


@pytest.mark.parametrize("kind", ["sd_trainer", "finetune", "sd-scripts", "kohya_ss", "simpletuner"])
def test_whatever_the_values_are_every_key_has_a_line_or_the_error_names_the_key(tmp_path, kind):
    finished = 0
    for seed in range(30):
        draw = random.Random(seed)
        if kind == "sd-scripts":
            more = (
                "network_dim",
                "max_train_epochs",
                "lr_warmup_steps",
                "learning_rate",
                "optimizer_args",
                "resolution",
            )
            subsets = [random_arguments(draw, sd_scripts.KNOWN, ("image_dir", "num_repeats", *more)) for _ in range(2)]
            tree = random_arguments(draw, sd_scripts.KNOWN, more) | {"network_module": "lora", "output_name": "a"}
            tree |= {
                "datasets": [{"resolution": draw.choice(USUAL), "subsets": subsets}],
                "general": {"batch_size": 2},
            }
        elif kind == "kohya_ss":
            more = ("optimizer", "lr_warmup", "epoch", "network_dim", "learning_rate", "factor", "dora_wd")
            tree = random_arguments(draw, {**sd_scripts.KNOWN, **kohya_gui._KNOWN}, more) | {"LoRA_type": "Flux1"}
        elif kind == "simpletuner":
            more = ("lora_rank", "max_train_steps", "learning_rate", "optimizer", "use_ema", "data_backend_config")
            tree = random_arguments(draw, simpletuner.KNOWN, more) | {"model_family": "flux", "model_type": "lora"}
            datasets = [random_arguments(draw, simpletuner.KNOWN, ("id", "resolution", "repeats")) for _ in range(3)]
            (tmp_path / "data.json").write_text(json.dumps(datasets))
        else:
            tree = random_job(draw, kind)
        (tmp_path / "old.json").write_text(json.dumps(tree))
        data = tmp_path / "data.json" if kind == "simpletuner" else None
        try:
            imported = import_file(tmp_path / "old.json", {}, lambda folder: 3, data)
        except InputError:  # of a value that is no number where one must be
            continue
        finished += 1
        keys = [line.key for line in imported.lines]
        assert len(keys) == len(set(keys)) > 10
        assert all(line.why for line in imported.lines if line.verdict in ("no equivalent", "unknown key"))
        assert parse_yaml(render_config(imported, "old", "new")).value == imported.config, f"seed {seed}"
    assert finished > 10, "most of the configs are refused"
