"""Lists of pictures for the tests."""

import io

from configs.dataset_schema import DatasetConfig
from data.sources.problems import Findings
from data.sources.tables import list_table, names_are_below


def dataset(table, **columns):
    return DatasetConfig.model_validate({"name": "listed", "table": str(table), "columns": columns})


def items_of(table, *, below=None, masks=True, packed=None, pack="pack", **columns):
    below = names_are_below(str(table), str(below or table))
    packed = io.BytesIO() if packed is None else packed
    findings = Findings()
    items = list_table(
        str(table), table, below, dataset(table, **columns), findings, masks=masks, pack=pack, packed=packed
    )
    findings.raise_problems()
    return items
