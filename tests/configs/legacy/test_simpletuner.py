import json
from collections import Counter

import pytest

from configs.legacy.detect import import_file
from configs.legacy.read_file import read_old_file
from configs.legacy.words import FILL, TRAINS_DEV, TRAINS_FILL
from tests.configs.legacy.old_files import SAMPLES, import_sample, leaves, line_of


@pytest.fixture
def translate(tmp_path):
    """The translation of settings and datasets."""

    def make(settings, datasets=None, pictures=None):
        (tmp_path / "config.json").write_text(json.dumps({"model_family": "flux", "model_type": "lora", **settings}))
        data = None
        if datasets is not None:
            data = tmp_path / "data.json"
            data.write_text(json.dumps(datasets))
        return import_file(tmp_path / "config.json", {}, lambda folder: pictures, data)

    return make


def test_settings_and_datasets_are_translated_to_the_last_value():
    imported = import_sample("simpletuner.json")
    assert imported.config == {
        "version": 1,
        "run": {"name": "red-sofa", "dir": "output/models", "seed": 42},
        "model": {"base": FILL, "precision": "nf4"},
        "method": {"type": "lora", "rank": 16, "alpha": 16.0},
        "data": {
            "cache": "cache/red-sofa",
            "holdout": 8,
            "datasets": [{"name": "sofas", "target": "/data/sofas", "mask": "/data/sofa-masks"}],
            "captions": {"dropout": 0.1},
            "resolution": [1024],
        },
        "train": {
            "steps": 3000,
            "global_batch_size": 4,
            "optimizer": "adamw",
            "lr": 8e-5,
            "weight_decay": 0.01,
            "max_grad_norm": 2.0,
            "activation_checkpointing": True,
            "lr_schedule": "linear",
            "warmup_steps": 100,
            "ema_decay": None,
        },
        "flow": {"timestep_sampling": "logit_normal", "shift": "dynamic", "guidance": 30.0},
        "validation": {"every_steps": 250, "sampler_steps": 20},
        "checkpoint": {"every_steps": 500, "keep_last": 5},
    }
    assert any(sentence.endswith(TRAINS_FILL) for sentence in imported.really_did)
    for key in ("aws_access_key_id", "aws_secret_access_key"):
        assert line_of(imported, key).verdict == "secret, dropped"


def test_every_key_of_both_files_has_one_line():
    settings = [key.lstrip("-") for key in read_old_file(SAMPLES / "simpletuner.json")]
    datasets = leaves(json.loads((SAMPLES / "simpletuner_datasets.json").read_text()), "dataloader")
    assert Counter(line.key for line in import_sample("simpletuner.json").lines) == Counter([*settings, *datasets])


def test_repeats_are_on_top_of_the_first_time_and_epochs_are_counted_with_them(translate):
    datasets = [
        {"id": "a", "instance_data_dir": "/a", "repeats": 4},
        {"id": "b", "instance_data_dir": "/b", "resolution": 1.0, "resolution_type": "area"},
        {"id": "off", "instance_data_dir": "/c", "disabled": True},
    ]
    settings = {"num_train_epochs": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    imported = translate(settings, datasets, pictures=10)
    data = imported.config["data"]
    assert [(dataset["name"], dataset["weight"]) for dataset in data["datasets"]] == [("a", 50.0), ("b", 10.0)]
    assert imported.config["train"]["steps"] == 45  # 3 x 60 samples, 4 an update
    assert data["resolution"] == [992], "a megapixel"
    assert line_of(imported, "dataloader[2].instance_data_dir").why == "switched off"


def test_what_the_settings_lack_is_asked_for(translate):
    imported = translate({"num_train_epochs": 3})
    assert any(sentence.endswith(TRAINS_DEV) for sentence in imported.really_did)  # its own default
    assert set(imported.fill_in) == {"train.steps", "data.datasets.0.target"}


def test_a_reference_beside_a_mask_is_the_source(translate):
    datasets = [
        {"id": "a", "instance_data_dir": "/a", "conditioning_data": ["m", "r"]},
        {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "/m"},
        {"id": "r", "dataset_type": "conditioning", "conditioning_type": "reference_strict", "instance_data_dir": "/r"},
    ]
    (dataset,) = translate({"max_train_steps": 3}, datasets).config["data"]["datasets"]
    assert (dataset["target"], dataset["mask"], dataset["source"]) == ("/a", "/m", "/r")


REFERENCE = {
    "id": "r",
    "dataset_type": "conditioning",
    "conditioning_type": "reference_strict",
    "instance_data_dir": "/r",
}


def test_a_reference_without_masks_is_the_source_and_the_masks_are_asked_for(translate):
    imported = translate(
        {"max_train_steps": 3}, [{"id": "a", "instance_data_dir": "/a", "conditioning_data": "r"}, REFERENCE]
    )
    (dataset,) = imported.config["data"]["datasets"]
    assert (dataset["source"], dataset["mask"]) == ("/r", None)
    assert "fluxfill migrate" in imported.fill_in["data.datasets.0.mask"]
    assert line_of(imported, "dataloader[1].instance_data_dir").verdict == "converted"


def test_a_set_that_no_dataset_takes_has_no_equivalent(translate):
    imported = translate({"max_train_steps": 3}, [{"id": "a", "instance_data_dir": "/a"}, REFERENCE])
    for key in ("id", "instance_data_dir", "conditioning_type"):
        line = line_of(imported, f"dataloader[1].{key}")
        assert (line.verdict, line.why[:8]) == ("no equivalent", "not used")


def test_two_datasets_may_share_their_masks(translate):
    masks = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "/m"}
    both = [{"id": name, "instance_data_dir": f"/{name}", "conditioning_data": "m"} for name in ("a", "b")]
    datasets = translate({"max_train_steps": 3}, [*both, masks]).config["data"]["datasets"]
    assert [dataset["mask"] for dataset in datasets] == ["/m", "/m"]


def test_pictures_are_those_that_are_given_where_the_dataloaders_file_is_not_here(translate):
    imported = translate({"num_train_epochs": 3, "train_batch_size": 2}, pictures=10)
    assert imported.config["train"]["steps"] == 15
    assert set(imported.fill_in) == {"data.datasets.0.target"}


@pytest.mark.parametrize(
    "key, section",
    [
        ("checkpoint_step_interval", "checkpoint"),
        ("checkpointing_steps", "checkpoint"),
        ("validation_step_interval", "validation"),
        ("validation_steps", "validation"),
    ],
)
@pytest.mark.parametrize("zero", [0, "0"])
def test_0_is_off_and_not_the_default(translate, key, section, zero):
    imported = translate({"max_train_steps": 3, key: zero})
    assert imported.config[section] == {"every_steps": None}
    line = line_of(imported, key)
    assert (line.verdict, line.new) == ("converted", f"{section}.every_steps: null")


def test_a_limit_of_0_checkpoints_keeps_all(translate):
    imported = translate({"max_train_steps": 3, "checkpoints_total_limit": 0})
    assert imported.config["checkpoint"] == {"keep_last": None}
    assert line_of(imported, "checkpoints_total_limit").why == "0 stands for no limit"


def test_saves_that_are_counted_in_epochs_are_not_off(translate):
    intervals = {"checkpoint_step_interval": 0, "checkpoint_epoch_interval": 1, "validation_epoch_interval": 2}
    imported = translate({"num_train_epochs": 3, "train_batch_size": 2, **intervals}, pictures=10)
    assert imported.config["checkpoint"] == {"every_steps": 5}
    assert imported.config["validation"] == {"every_steps": 10}
    assert line_of(imported, "checkpoint_step_interval").why == "checkpoint_epoch_interval counts"
    unknown = translate({"max_train_steps": 3, **intervals})
    assert not {"checkpoint", "validation"} & unknown.config.keys()
    assert line_of(unknown, "checkpoint_epoch_interval").verdict == "no equivalent"


def test_a_full_fine_tune_has_no_rank(translate):
    imported = translate(
        {"model_type": "full", "lora_rank": 8, "use_ema": True, "ema_decay": 0.99, "max_train_steps": 3}
    )
    assert imported.config["method"] == {"type": "full"}
    assert imported.config["train"]["ema_decay"] == 0.99
    assert line_of(imported, "lora_rank").verdict == "ignored by the old trainer too"


def test_what_the_config_leaves_out_is_as_simpletuner_has_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_family": "flux", "max_train_steps": 3, "data_backend_config": "x"}')
    config = import_file(tmp_path / "config.json", {}, lambda folder: None).config
    assert config["method"]["type"] == "full"
    assert (config["train"]["global_batch_size"], config["train"]["max_grad_norm"]) == (4, 2.0)
    assert config["flow"]["shift"] == 3.0
    assert config["data"]["captions"]["dropout"] == 0.0


def test_defaults_that_differ_by_release_are_said(translate):
    notes = translate({"max_train_steps": 3}).notes
    assert "earlier ones had sine" in notes["train.lr_schedule"] and "had 500" in notes["train.warmup_steps"]
    assert "releases up to 2" in notes["data.captions.dropout"]


@pytest.mark.parametrize(
    "settings, shift",
    [
        ({"flow_schedule_shift": 1.5, "flow_schedule_auto_shift": True}, 1.5),
        ({"flow_schedule_shift": 0, "flow_schedule_auto_shift": True}, "dynamic"),
        ({"flux_schedule_shift": 0}, "none"),
        ({"flow_schedule_auto_shift": True}, "dynamic"),
    ],
)
def test_a_fixed_shift_counts_before_that_of_the_pictures_size(translate, settings, shift):
    imported = translate({"max_train_steps": 3, **settings})
    assert imported.config["flow"]["shift"] == shift and imported.config["flow"]["guidance"] == 30.0
    assert not {line.verdict for line in imported.lines} & {"unknown key"}
    says_so = any("flow.shift=3" in sentence for sentence in imported.really_did)
    assert says_so == (settings == {"flow_schedule_auto_shift": True})
