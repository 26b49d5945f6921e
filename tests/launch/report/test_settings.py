import pytest

from configs.loading import dump_config, load_config
from launch.command import REPO_ROOT
from launch.report.settings import read_settings


def settings_of(path, recipe, overrides=()):
    path.write_text(dump_config(load_config(REPO_ROOT / "configs" / f"{recipe}.yaml", overrides)), encoding="utf-8")
    return read_settings(path)


@pytest.mark.parametrize("recipe", ["fill_lora", "fill_full", "dev_to_fill_full", "demo"])
def test_a_recipe_as_it_is_differs_in_nothing(tmp_path, recipe):
    told = settings_of(tmp_path / "config.yaml", recipe, ["run.name=mine", "data.cache=/elsewhere"])
    assert told["recipe"] == recipe and all(each["recipe"] is None for each in told["settings"])


def test_what_differs_stands_beside_the_recipes_value(tmp_path):
    told = settings_of(tmp_path / "config.yaml", "fill_lora", ["train.lr=3e-5", "train.max_grad_norm=null"])
    differing = {each["key"]: (each["value"], each["recipe"]) for each in told["settings"] if each["recipe"]}
    assert differing == {"train.lr": ("3e-05", "0.0001"), "train.max_grad_norm": ("null", "1.0")}


def test_secrets_that_somebody_wrote_there_are_hidden(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "data: {cache: 'https://me:planted1@host/c?sig=planted2'}\nslurm: {env: {HF_TOKEN: planted3}}\ntrain: {lr: 1}\n"
    )
    told = read_settings(path)
    assert "planted" not in str(told) and len(told["settings"]) == 3


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "just text"])
def test_what_is_no_config_has_no_settings(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert read_settings(tmp_path / "config.yaml") == {"recipe": "", "settings": []}
