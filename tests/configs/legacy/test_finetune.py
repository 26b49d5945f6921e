import pytest

from configs.legacy.detect import import_file
from tests.configs.legacy.old_files import import_sample, line_of


@pytest.fixture
def translate(tmp_path):
    """The translation of a finetune process with these keys, in YAML's short form."""

    def make(keys, pictures=None):
        path = tmp_path / "old.yaml"
        path.write_text(f"job: train\nconfig: {{name: a, process: [{{type: finetune, {keys}}}]}}\n")
        return import_file(path, {}, lambda folder: pictures)

    return make


def test_the_old_trainer_of_three_folders_is_translated_to_the_last_value():
    imported = import_sample("finetune.yaml")
    assert imported.config == {
        "version": 1,
        "run": {"name": "old_inpainting", "dir": "output"},
        "model": {"base": "models/FLUX.1-Fill-dev"},
        "method": {"type": "full"},
        "data": {
            "cache": "cache/old_inpainting",
            "holdout": 8,
            "datasets": [{"name": "target", "target": "/data/target", "source": "/data/holed", "mask": "/data/mask"}],
            "resolution": [512],
            "captions": {"dropout": 0.0},
        },
        "train": {
            "global_batch_size": 8,
            "steps": 80,  # 20 epochs of 30 pictures, 8 an update
            "lr": 1e-5,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "optimizer": "adamw8bit",
        },
    }
    assert "no flow matching" in imported.really_did[0] and "not the weights" in imported.really_did[0]
    assert any("captions" in sentence for sentence in imported.really_did)


def test_epochs_that_cannot_be_counted_are_asked_for(translate):
    imported = translate("target_image_dir: /t, mask_dir: /m, num_epochs: 5")
    assert imported.config["train"]["steps"] is None and "train.steps" in imported.fill_in


def test_epochs_are_those_of_the_sources_which_the_old_trainer_went_through(tmp_path):
    keys = "type: finetune, source_image_dir: /s, target_image_dir: /t, mask_dir: /m, num_epochs: 2, resolution: '768'"
    (tmp_path / "old.yaml").write_text(f"job: train\nconfig: {{name: a, process: [{{{keys}}}]}}\n")
    imported = import_file(tmp_path / "old.yaml", {}, {"/s": 5, "/t": 50}.get)
    assert imported.config["train"]["steps"] == 10
    assert imported.config["data"]["resolution"] == [768]


def test_what_is_no_folder_is_none(translate):
    imported = translate("target_image_dir: {a: b}, source_image_dir: [], mask_dir: [/m]")
    assert imported.config["data"]["datasets"] == [{"name": "pictures", "target": None, "mask": None}]
    assert line_of(imported, "source_image_dir").verdict == line_of(imported, "mask_dir").verdict == "no equivalent"


def test_steps_count_before_epochs_and_the_second_stages_rate_before_the_first(translate):
    imported = translate(
        "target_image_dir: /t, source_image_dir: /s, steps: 900, two_stage_training: true, stage1_steps: 100, "
        "stage1_lr: 1e-3, stage2_lr: 2e-5, lr: 1e-5, num_epochs: 3"
    )
    assert imported.config["train"]["steps"] == 900 and imported.config["train"]["lr"] == 2e-5
    assert line_of(imported, "stage1_lr").verdict == "no equivalent"
    assert set(imported.fill_in) == {"model.base", "data.datasets.0.mask"}
