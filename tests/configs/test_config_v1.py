"""Version 1 of configs stays readable, and means what it meant. format_v1/ holds one with every key, kept as it was."""

import hashlib
import json
from pathlib import Path

import yaml

from configs.cache_settings import manifest_settings, picture_settings, plan_settings, tensor_settings
from configs.loading import load_config
from configs.upgrade import upgrade_config

FILE = Path(__file__).parent / "format_v1" / "config.yaml"


def flat(value, prefix: str = "") -> dict:
    if isinstance(value, dict | list) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: found for key, entry in entries for place, found in flat(entry, f"{prefix}.{key}").items()}
    return {prefix: value}


def test_every_key_of_it_is_still_what_it_says():
    said = flat(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    loaded = flat(load_config(FILE).model_dump(mode="json"))
    assert {key: loaded.get(key, "gone") for key in said} == said
    assert len(said) > 200


def test_a_cache_of_it_stays_good():
    """Another hash here, and everybody's pictures would be encoded anew, or be refused."""
    data = load_config(FILE).data
    settings = [manifest_settings(data), tensor_settings(data)]
    settings += [ask for dataset in data.datasets for ask in (picture_settings(dataset), plan_settings(data, dataset))]
    text = json.dumps(settings, sort_keys=True)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "904d9980a1e50b47f1c7bfa31ba14a651b62003d86d876131c52f719ee9f9596"
    ), text


def test_it_is_up_to_date():
    assert upgrade_config(FILE)[1] == []
