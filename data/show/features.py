"""The `features=` of Hugging Face's datasets for a cache's shards: every column, whatever the first samples hold.

datasets infers columns from the first five samples of the first tar: of a dataset with more masks than the first some
would be dropped. In format 1 shards begin with texts, which have one column: the tar is refused, or the rest dropped.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

from configs.errors import InputError
from data.cache.manifest import Manifest, ShardTable
from data.cache.members import TEXT_SUFFIX

_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}


def datasets_features(cache: Path, manifest: Manifest, table: ShardTable) -> str:
    """Python that makes `features` for `load_dataset("webdataset", ...)`. Raises InputError for a cache without shards.

    A sample of fewer masks than another, and a text of format 1, have None in the columns that they lack.
    """
    if not len(table):
        raise InputError(f"{cache}: holds no shard yet. Run `fluxfill preprocess` on its config.")
    columns = {"__key__": 'Value("string")', "__url__": 'Value("string")', "safetensors": 'Value("binary")'}
    if manifest.format_version > 1:
        columns[TEXT_SUFFIX] = 'Value("binary")'
    masks = max(manifest.mask_variants.values())
    columns |= {f"m{number}.safetensors": 'Value("binary")' for number in range(masks)}
    columns["json"] = _feature(_first_json(cache / str(table.path[0])))
    lines = "".join(f"    {json.dumps(name)}: {feature},\n" for name, feature in columns.items())
    return f"from datasets import Features, List, Value\n\nfeatures = Features({{\n{lines}}})\n"


def _first_json(shard: Path) -> dict[str, Any]:
    with tarfile.open(shard) as tar:
        member = next(member for member in tar if member.name.endswith(".json"))
        file = tar.extractfile(member)
        assert file is not None
        return json.load(file)


def _feature(value: Any) -> str:
    """The feature of a JSON value; the first entry of a list stands for all of them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {_feature(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"List({_feature(value[0])})"
    return f'Value("{_TYPES[type(value)]}")'
