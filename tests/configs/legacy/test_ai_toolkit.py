import json
from collections import Counter

import pytest
import yaml

from configs.legacy.words import DEV, FILL, TRAINS_DEV
from tests.configs.legacy.old_files import MIGRATED, SAMPLES, YAML, import_job, import_sample, leaves, line_of

RANDOM = {"random": {"brush": 0.6, "box": 0.2, "outpaint": 0.2}, "variants": 4}


def process(name):
    return yaml.safe_load((SAMPLES / name).read_text())["config"]["process"][0]


@pytest.mark.parametrize("name", YAML)
def test_every_key_of_a_job_has_one_line(name):
    keys = Counter(line.key for line in import_sample(name).lines)
    assert keys == Counter(leaves(yaml.safe_load((SAMPLES / name).read_text())))


def test_an_adapter_on_24_gb_is_translated_to_the_last_value():
    imported = import_sample("lora_24gb.yaml")
    assert imported.config == {
        "version": 1,
        "run": {"name": "red-sofa", "dir": "output", "seed": 42},
        "model": {"base": DEV, "precision": "fp8"},
        "method": {"type": "lora", "rank": 16, "alpha": 16.0, "targets": "attention+mlp"},
        "data": {
            "cache": "cache/red-sofa",
            "holdout": 8,
            "datasets": [{"name": "sofas", "target": "/data/sofas", "mask": RANDOM}],
            "resolution": [512, 768, 1024],
            "resolution_policy": "each",
            "captions": {"trigger": "s0fa", "dropout": 0.05},
        },
        "train": {
            "steps": 2000,
            "global_batch_size": 4,
            "optimizer": "adamw8bit",
            "lr": 1e-4,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "ema_decay": 0.99,
            "activation_checkpointing": True,
        },
        "flow": {"timestep_sampling": "logit_normal", "shift": "none", "guidance": 30.0},
        "validation": {"every_steps": 250, "sampler_steps": 20},
        "checkpoint": {"every_steps": 250, "keep_last": 4},
    }
    assert line_of(imported, "hf_token").verdict == "secret, dropped"
    assert line_of(imported, "linear_alpha").verdict == "ignored by the old trainer too"
    assert line_of(imported, "sample.prompts").verdict == "no equivalent"
    assert line_of(imported, "meta.name").value == "red-sofa", "[name] is the job's name"
    assert any("set alpha to the rank, 16" in sentence for sentence in imported.really_did)


def test_a_full_fine_tune_of_two_datasets_is_translated_to_the_last_value():
    imported = import_sample("full.yaml")
    assert imported.config == {
        "version": 1,
        "run": {"name": "rooms-full", "dir": "/runs/rooms full", "seed": 7},
        "model": {"base": FILL, "precision": "auto"},
        "method": {"type": "full"},
        "data": {
            "cache": "cache/rooms-full",
            "holdout": 8,
            "datasets": [
                {"name": "rooms", "target": "/data/rooms", "mask": "/data/rooms-masks", "flip": True, "weight": 60.0},
                {
                    "name": "kitchens",
                    "target": "/data/kitchens",
                    "mask": {"folder": "/data/kitchens-masks", "label": 0},
                    "weight": 10.0,
                },
            ],
            "resolution": [768],
            "captions": {"default": "a tidy room", "dropout": 0.0},
        },
        "train": {
            "compile": "regional",
            "steps": 6000,
            "global_batch_size": 2,
            "optimizer": "adafactor",
            "lr": 2e-5,
            "weight_decay": 1e-4,
            "max_grad_norm": 0.5,
            "lr_schedule": "cosine",
            "lr_final_fraction": 0.1,
            "warmup_steps": 200,
            "ema_decay": None,
            "activation_checkpointing": True,
        },
        "flow": {"keep_weight": 0.1, "timestep_sampling": "uniform", "shift": "dynamic", "guidance": 3.5},
        "validation": {"every_steps": 1000, "sampler_steps": 20},
        "checkpoint": {"every_steps": 500, "keep_last": 5},
    }
    assert line_of(imported, "ema_decay").verdict == "ignored by the old trainer too"
    assert line_of(imported, "is_reg").verdict == "no equivalent"
    assert "384 inputs" in imported.really_did[0], "the old trainer cannot train FLUX.1-Fill"


@pytest.mark.parametrize("name", MIGRATED)
def test_what_the_old_quick_start_wrote_is_translated_to_the_last_value(name):
    imported, old = import_sample(name), process(name)
    accumulation = old["train"]["gradient_accumulation_steps"]
    assert imported.config == {
        "version": 1,
        "run": {"name": "flux_inpainting", "dir": "output/flux_inpainting", "seed": 42},
        "model": {"base": DEV, "precision": "auto"},
        "method": {"type": "full"},
        "data": {
            "cache": "cache/flux_inpainting",
            "holdout": 8,
            "datasets": [{"name": "target_images", "target": "data/target_images", "mask": "data/masks"}],
            "resolution": old["datasets"][0]["resolution"],
            "resolution_policy": "each",
            "captions": {"default": "a high quality image", "dropout": 0.0},
        },
        "train": {
            "steps": {2: 1000, 4: 500}[accumulation],
            "global_batch_size": 1,
            "optimizer": "adamw8bit",
            "lr": 1e-4,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "ema_decay": 0.99,
            "activation_checkpointing": True,
        },
        "flow": {"timestep_sampling": "uniform", "shift": "dynamic", "guidance": 30.0},
        "validation": {"every_steps": {2: 125, 4: 62}[accumulation], "sampler_steps": 20},
        "checkpoint": {"every_steps": {2: 125, 4: 62}[accumulation], "keep_last": 4},
    }
    for key in ("train.is_inpainting", "sample.enabled"):
        assert line_of(imported, key).verdict == "ignored by the old trainer too"
    said = " ".join(imported.really_did)
    assert TRAINS_DEV in said and "FLUX.1-Fill is trained" not in said
    for fact in (
        "text-to-image",
        "weighed the loss",
        "inpaint_path was never used",
        f"accumulation_steps {accumulation}",
    ):
        assert fact in said
    assert f"train.global_batch_size={accumulation}" in line_of(imported, "gradient_accumulation_steps").why


@pytest.mark.parametrize(
    "network, method",
    [
        ("{type: lora, rank: 8, alpha: 4}", {"type": "lora", "rank": 8, "alpha": 8.0}),
        ("{type: locon, linear: 8, conv: 4}", {"type": "lora", "rank": 8, "alpha": 8.0}),
        ("{type: lokr}", {"type": "lokr", "rank": 10_000, "factor": "auto", "alpha": 10_000.0}),
        (
            "{type: lokr, lokr_full_rank: false, linear: 8, lokr_factor: 4}",
            {"type": "lokr", "rank": 8, "factor": 4, "alpha": 8.0},
        ),
        (
            "{linear: 32, pretrained_lora_path: /a.safetensors}",
            {"type": "lora", "rank": 32, "alpha": 32.0, "init_from": "/a.safetensors"},
        ),
    ],
)
def test_networks_of_flux_have_the_rank_as_alpha(tmp_path, network, method):
    imported = import_job(tmp_path / "old.yaml", f"network: {network}\nmodel: {{name_or_path: {FILL}}}")
    assert imported.config["method"] == method | {"targets": "attention+mlp"}


def test_misspelt_and_unknown_keys_are_named_as_such(tmp_path):
    imported = import_job(tmp_path / "old.yaml", "train: {stepps: 3}\nmodel: {name_or_path: x, is_flux: true}\nown: 1")
    assert line_of(imported, "stepps").verdict == line_of(imported, "own").verdict == "unknown key"
    assert "Was steps meant?" in line_of(imported, "stepps").why


def test_of_several_processes_the_first_that_trains_is_taken_and_the_others_keys_are_listed(tmp_path):
    text = """
config:
  name: two
  process:
    - {type: extract, layers: [a]}
    - {type: sd_trainer, train: {steps: 7}, model: {name_or_path: /m}}
"""
    (tmp_path / "old.yaml").write_text(text)
    from configs.legacy.detect import import_file

    imported = import_file(tmp_path / "old.yaml", {}, lambda folder: None)
    assert imported.config["train"]["steps"] == 7
    assert line_of(imported, "process[0].layers").why.startswith("a process of its own")
    assert json.loads(json.dumps(imported.config)) == imported.config
