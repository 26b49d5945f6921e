"""Changes rows of a run's batches, as a soak has planned it; the trainer itself knows nothing of it. Python loads a
module of this name by itself when it starts, from PYTHONPATH.

FLUXFILL_SOAK_ROWS: a JSON file of {"nan": [positions in the order whose row is made NaN],
"instead": {position: the row of its shard that is read instead}}.
"""

import importlib.util
import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_CHANGED = "data.batches.row_filler"


def change_rows(row_filler: type, nan: set[int], instead: dict[int, int]) -> None:
    """Have RowFiller change these rows of all that it fills."""
    begin, first_intact = row_filler.begin, row_filler.first_intact  # type: ignore[attr-defined]

    def begin_as_nan(self: Any, rows: Any, place: int, position: int) -> Any:
        to_fill = begin(self, rows, place, position)
        if position in nan:
            rows.uniform[place] = float("nan")  # so are its noise level, its loss and its gradient
        return to_fill

    def first_intact_instead(self: Any, read: Any, *, row: int, position: int, **given: Any) -> Any:
        return first_intact(self, read, row=instead.get(position, row), position=position, **given)

    row_filler.begin, row_filler.first_intact = begin_as_nan, first_intact_instead  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    """Changes the class right after its module is loaded: loading it here would slow every start down."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _CHANGED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            planned = json.loads(Path(os.environ["FLUXFILL_SOAK_ROWS"]).read_text(encoding="utf-8"))
            instead = {int(position): row for position, row in planned["instead"].items()}
            change_rows(module.RowFiller, set(planned["nan"]), instead)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


if "FLUXFILL_SOAK_ROWS" in os.environ:
    sys.meta_path.insert(0, _Finder())
