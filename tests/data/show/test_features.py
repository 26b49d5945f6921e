import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.errors import InputError
from data.cache.manifest import read_manifest, read_shard_table
from data.show.features import datasets_features

FORMAT_V1 = Path(__file__).parents[1] / "cache" / "format_v1"
TYPES = {"string": str, "int64": int, "float64": float, "bool": bool, "binary": bytes}


def columns_of(text: str, monkeypatch) -> dict:
    """What the text makes, with the types of Python in the place of those of datasets, which is not installed."""
    words = SimpleNamespace(Features=dict, List=lambda inner: [inner], Value=TYPES.__getitem__)
    monkeypatch.setitem(sys.modules, "datasets", words)
    made: dict = {}
    exec(text, made)
    return made["features"]


def fits(value, feature) -> bool:
    if isinstance(feature, dict):
        return value.keys() == feature.keys() and all(fits(value[name], feature[name]) for name in feature)
    if isinstance(feature, list):
        return isinstance(value, list) and all(fits(entry, feature[0]) for entry in value)
    return type(value) is feature


@pytest.mark.parametrize("place", ["cache", FORMAT_V1 / "bf16", FORMAT_V1 / "int8"], ids=["now", "bf16", "int8"])
def test_every_member_of_every_shard_has_its_column(cache, place, monkeypatch):
    folder = cache.folder if place == "cache" else place
    table = read_shard_table(folder)
    columns = columns_of(datasets_features(folder, read_manifest(folder), table), monkeypatch)
    seen = {"__key__", "__url__"}
    for path in table.path:
        with tarfile.open(folder / str(path)) as tar:
            for member in tar:
                _, _, column = member.name.rpartition("/")[2].partition(".")
                seen.add(column)
                if column == "json":
                    assert fits(json.load(tar.extractfile(member)), columns["json"]), member.name
                else:
                    assert columns[column] is bytes
    assert seen == columns.keys()


def test_a_cache_without_shards_has_none(cache):
    table = read_shard_table(cache.folder)
    empty = type(table)(*(np.empty(0, column.dtype) for column in vars(table).values()))
    with pytest.raises(InputError, match="holds no shard yet"):
        datasets_features(cache.folder, read_manifest(cache.folder), empty)
