import json

import pytest

from configs.errors import InputError
from configs.legacy.detect import import_file
from configs.legacy.words import DEV
from tests.configs.legacy.old_files import line_of

SAVED = {
    "LoRA_type": "Flux1",
    "flux1_checkbox": True,
    "pretrained_model_name_or_path": DEV,
    "train_data_dir": "img",
    "output_dir": "out",
    "output_name": "sofa",
    "network_dim": 32,
    "network_alpha": 16,
    "optimizer": "AdamW8bit",
    "optimizer_args": "weight_decay=0.05 betas=.9,.99",
    "learning_rate": 0.0003,
    "unet_lr": 0,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "max_resolution": "768,768",
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "epoch": 4,
    "max_train_epochs": 0,
    "max_train_steps": 0,
    "save_every_n_epochs": 1,
    "save_every_n_steps": 0,
    "sample_every_n_epochs": 0,
    "sample_every_n_steps": 0,
    "save_as_bool": False,
    "t5xxl_lr": 0,
    "dataset_config": "",
    "network_weights": "",
    "wandb_api_key": "",
    "seed": 42,
}


@pytest.fixture
def translate(tmp_path, monkeypatch):
    """The translation of SAVED with other values, beside two folders of pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("5_sofa", "1_room"):
        (tmp_path / "img" / name).mkdir(parents=True)

    def make(**other):
        (tmp_path / "old.json").write_text(json.dumps(SAVED | other))
        return import_file(tmp_path / "old.json", {}, lambda folder: 10)

    return make


def test_a_saved_configuration_is_translated_to_the_last_value(translate):
    imported = translate()
    assert imported.program == "the kohya_ss GUI"
    assert imported.config["method"] == {"type": "lora", "rank": 32, "alpha": 16.0}
    assert imported.config["data"]["resolution"] == [768]
    assert [each["weight"] for each in imported.config["data"]["datasets"]] == [10.0, 50.0]
    train = imported.config["train"]
    assert (train["steps"], train["global_batch_size"]) == (120, 2)  # 4 epochs of 5 x 10 + 10
    assert (train["optimizer"], train["lr"], train["weight_decay"]) == ("adamw8bit", 3e-4, 0.05)
    assert (train["lr_schedule"], train["warmup_steps"]) == ("cosine", 12)
    assert imported.config["checkpoint"] == {"every_steps": 30}
    assert imported.config["validation"] == {"every_steps": None}
    assert not [line.key for line in imported.lines if line.verdict == "unknown key"]


def test_every_key_has_one_line_by_the_name_that_the_file_gives_it(translate):
    assert [line.key for line in translate().lines] == list(SAVED)
    assert line_of(translate(), "max_resolution").new == "data.resolution: [768]"
    with pytest.raises(InputError, match=r"^max_resolution is many,"):
        translate(max_resolution="many")


@pytest.mark.parametrize(
    "other, steps, warmup",
    [
        ({"max_train_steps": 900}, 900, 90),
        ({"max_train_steps": 900, "max_train_epochs": 2}, 60, 6),
        ({"max_train_steps": 900, "lr_warmup_steps": 7}, 900, 7),
        ({"dataset_config": "nowhere.toml"}, 1600, 160),
        ({"max_train_steps": 100, "lr_warmup": 29}, 100, 29),
        ({"max_train_steps": 900, "lr_warmup": 0.5}, 900, 4),
        ({"max_train_steps": 900, "lr_warmup": 100}, 900, 899),
        ({"max_train_steps": 900, "lr_warmup": 150}, 900, 899),
    ],
)
def test_a_run_is_counted_as_the_gui_counts_it(translate, other, steps, warmup):
    train = translate(**other).config["train"]
    assert (train["steps"], train["warmup_steps"]) == (steps, warmup)


@pytest.mark.parametrize(
    "other, method",
    [
        ({"LoRA_type": "LyCORIS/LoKr", "factor": 8}, {"type": "lokr", "rank": 32, "factor": 8, "alpha": 16.0}),
        ({"LoRA_type": "LyCORIS/LoCon", "dora_wd": True}, {"type": "dora", "rank": 32, "alpha": 16.0}),
        ({"LoRA_type": "LyCORIS/LoHa"}, {"type": "lora", "rank": 32, "alpha": 16.0}),
        ({"LoRA_type": "LyCORIS/Native Fine-Tuning"}, {"type": "full"}),
    ],
)
def test_the_type_of_the_adapter_decides_the_method(translate, other, method):
    assert translate(**other).config["method"] == method
