import pytest

from configs.loading import load_config
from launch.command import REPO_ROOT
from launch.plan.settings import cached_settings, smaller_settings, with_settings, written

CONFIGS = REPO_ROOT / "configs"


@pytest.mark.parametrize(
    "recipe, overrides, names",
    [
        ("fill_lora", [], ["model.precision=int8", "model.precision=nf4"]),
        ("fill_lora", ["model.precision=int8"], ["model.precision=nf4"]),
        ("fill_lora", ["model.precision=nf4"], []),
        (
            "fill_full",
            ["train.optimizer=adamw", "train.ema_decay=0.99"],
            [
                "train.optimizer=adamw8bit",
                "train.ema_decay=null",
                "train.weights=bf16_stochastic train.optimizer=adamw",
                "train.weights=bf16_stochastic train.optimizer=adamw train.ema_decay=null",
            ],
        ),
    ],
)
def test_each_is_what_the_same_words_on_a_command_line_make(recipe, overrides, names):
    config = load_config(CONFIGS / f"{recipe}.yaml", overrides)
    found = list(smaller_settings(config))
    assert [" ".join(written(settings)) for settings in found] == names
    for settings in found:
        again = load_config(CONFIGS / f"{recipe}.yaml", [*overrides, *written(settings)])
        assert with_settings(config, settings) == again


@pytest.mark.parametrize("devices, also", [("null", []), ("[cuda:1]", ["data.encoder_devices=null"])])
def test_a_cached_run_names_no_device_that_encodes(devices, also):
    config = load_config(CONFIGS / "fill_lora.yaml", ["data.mode=online", f"data.encoder_devices={devices}"])
    settings = cached_settings(config)
    assert written(settings) == ["data.mode=cached", *also]
    assert with_settings(config, settings) == load_config(CONFIGS / "fill_lora.yaml")


def test_keys_of_sections_within_sections_are_set_and_the_rest_stays():
    config = load_config(CONFIGS / "fill_lora.yaml", ["data.encoders.vae=cpu"])
    changed = with_settings(config, {"data.encoders.t5": "cpu", "train.activation_checkpointing": True})
    both = ["data.encoders.vae=cpu", "data.encoders.t5=cpu", "train.activation_checkpointing=true"]
    assert changed == load_config(CONFIGS / "fill_lora.yaml", both) and config.data.encoders.t5 == "auto"
