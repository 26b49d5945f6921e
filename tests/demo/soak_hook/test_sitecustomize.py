import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data.batches.row_filler import RowFiller, RowPolicy

HOOK = Path(__file__).resolve().parents[3] / "demo" / "soak_hook"


def test_rows_at_these_positions_are_others():
    class Changed(RowFiller):
        pass

    runpy.run_path(str(HOOK / "sitecustomize.py"))["change_rows"](Changed, {3}, {7: 2})
    filler = Changed(1, RowPolicy(), {}, {})
    found = [
        filler.first_intact(lambda row: row, shard="a", num_samples=9, row=5, position=position) for position in (6, 7)
    ]
    assert found == [(5, 5), (2, 2)]
    rows = SimpleNamespace(
        stored=[{"latents": memoryview(b"")}],
        noise=np.zeros((1, 4), np.float32),
        uniform=np.zeros(1, np.float32),
        unmasked=np.zeros(1, np.float32),
        weight=np.zeros(1, np.float32),
        position=np.zeros(1, np.int64),
    )
    for position in (2, 3):
        assert list(filler.begin(rows, 0, position)) == ["latents"]
        assert math.isnan(rows.uniform[0]) == (position == 3) and rows.position[0] == position


def test_a_process_with_it_in_its_path_has_its_rows_changed(tmp_path):
    """And no other: the plan is named in the environment."""
    plan = tmp_path / "rows.json"
    plan.write_text(json.dumps({"nan": [3], "instead": {"7": 2}}))
    look = "from data.batches.row_filler import RowFiller; print(RowFiller.begin.__name__)"
    names = []
    for planned in ({"FLUXFILL_SOAK_ROWS": str(plan)}, {}):
        environment = os.environ | {"PYTHONPATH": str(HOOK)} | planned
        done = subprocess.run([sys.executable, "-P", "-c", look], env=environment, stdout=subprocess.PIPE, check=True)
        names.append(done.stdout.decode().strip())
    assert names == ["begin_as_nan", "begin"]
