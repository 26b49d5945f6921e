from pathlib import Path

import pytest

import configs
from configs.loading import dump_config, load_config
from configs.schema import FullConfig

FOLDER = Path(configs.__file__).parent
RECIPES = sorted(FOLDER.glob("*.yaml"))
REAL = [path for path in RECIPES if path.stem != "demo"]


def test_the_recipes_are_all_there() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", "fill_lora", "fill_full", "dev_to_fill_full"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_schema_command_and_gpus(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=./schema.json"
    header = "\n".join(lines[: lines.index("version: 1")])
    assert f"fluxfill train configs/{path.name}" in header
    assert "Meant for" in header and "Expect" in header


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_recipe_admits_that_the_real_weights_were_not_tried(path: Path) -> None:
    assert "Not yet run on the real 12 B weights." in path.read_text(encoding="utf-8")


def test_recipes_write_to_folders_of_their_own() -> None:
    loaded = [load_config(path) for path in RECIPES]
    assert len({config.run.folder for config in loaded}) == len({config.data.cache for config in loaded}) == len(loaded)


def test_demo_is_the_experiment_that_is_known_to_learn() -> None:
    config = load_config(FOLDER / "demo.yaml")
    assert config.method == FullConfig(type="full")
    assert (config.train.steps, config.train.global_batch_size, config.train.lr) == (900, 16, 1e-3)
    assert (config.train.warmup_steps, config.train.lr_final_fraction) == (50, 0.05)
    assert config.data.resolution == [64] and config.validation.images == 48
