"""The config of a run beside the recipe that it is nearest to."""

from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import yaml

from configs.loading import load_config
from configs.redact import HIDDEN, is_secret_name, redact
from launch.command import REPO_ROOT

_RECIPES = ("fill_lora", "fill_full", "dev_to_fill_full", "demo")
_OF_EVERY_RUN = ("run.", "data.cache", "data.datasets")  # its name and places: no recipe has them


class Setting(TypedDict):
    """A key of the config.  recipe: what the recipe has there; None where it has the same."""

    key: str
    value: str
    recipe: str | None


class Settings(TypedDict):
    """recipe: its name; empty where there is no config."""

    recipe: str
    settings: list[Setting]


def read_settings(path: Path) -> Settings:
    """The config of a run, of any version, without secrets. Raises OSError if it cannot be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        return {"recipe": "", "settings": []}
    own = flatten(config)
    recipe = min(_RECIPES, key=lambda name: len(_differing(own, _recipe(name))))
    differing, theirs = _differing(own, _recipe(recipe)), _recipe(recipe)
    return {
        "recipe": recipe,
        "settings": [
            {
                "key": key,
                "value": _shown(key, value),
                "recipe": _shown(key, theirs.get(key, "(not set)")) if key in differing else None,
            }
            for key, value in own.items()
        ],
    }


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys -> values that are no mappings; datasets are told apart by their numbers."""
    if isinstance(value, dict) and value:
        return {
            inner: found
            for name, below in value.items()
            for inner, found in flatten(below, f"{key}.{name}" if key else str(name)).items()
        }
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return flatten(dict(enumerate(value)), key)
    return {key: value}


def _differing(own: dict[str, Any], recipe: dict[str, Any]) -> set[str]:
    return {
        key for key, value in own.items() if not key.startswith(_OF_EVERY_RUN) and value != recipe.get(key, "(not set)")
    }


@cache
def _recipe(name: str) -> dict[str, Any]:
    return flatten(load_config(REPO_ROOT / "configs" / f"{name}.yaml").model_dump(mode="json"))


def _shown(key: str, value: object) -> str:
    if is_secret_name(key.rpartition(".")[2]) and value is not None:
        return HIDDEN
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return redact(text, home="")
