"""Batch scripts that users write themselves, as docs/running.md tells them; and ours, as sbatch reads them."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.loading import load_config
from launch.slurm.render import render_train
from tests.holding import HOLD
from tests.slurm.cluster import Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def script_of_the_docs() -> str:
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    [script] = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)
    return script


def test_the_script_of_the_docs_saves_when_slurm_signals(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(config_file.read_text())
    script = script_of_the_docs().replace("fluxfill train", f"{BIN}/fluxfill train")
    hold = {"HOLD_AT": "2", "HOLD_UNTIL": f"{tmp_path}/go", "PYTHONPATH": str(HOLD)}
    around = replace(cluster, environment={**cluster.environment, **hold})
    job = around.submit(f"{script.rstrip()} run.dir={tmp_path} run.name=by-hand\n", folder=tmp_path)
    wait_for(lambda: "held" if (tmp_path / "go.held").exists() else None, "no step")
    cluster.run("scancel", "--signal=USR1", job)
    (tmp_path / "go").touch()
    assert cluster.wait(job) == "FAILED" and cluster.show(job)["ExitCode"] == "75:0"
    outcome = json.loads((tmp_path / "by-hand" / "outcome.json").read_text())
    assert (outcome["code"], "SIGUSR1" in outcome["reason"]) == (75, True)
    assert (tmp_path / "by-hand" / "checkpoints" / f"step-{outcome['step']:08d}" / "COMPLETE").exists()


def test_a_run_that_no_signal_would_reach_says_so(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    line = f"{BIN}/fluxfill train {config_file} --dry-run"
    job = cluster.submit(f"#!/bin/sh\n{line} > batch 2>&1\nsrun {line} > step 2>&1\n", folder=tmp_path)
    assert cluster.wait(job) == "COMPLETED"
    assert "would be killed unsaved. Start it by `exec srun" in (tmp_path / "batch").read_text()
    assert "killed unsaved" not in (tmp_path / "step").read_text()


def test_what_is_quoted_in_a_rendered_script_is_read_as_it_was_meant(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "here" $(touch harm) #1'
    folder.mkdir()
    comment = 'it is "$(mine)" `now` # 1\\2; it\'s'
    config = load_config(ROOT / "configs" / "fill_lora.yaml", [f"slurm.comment={json.dumps(comment)}"])
    job = cluster.submit(render_train(config, "my.yaml", [], folder, gpus_per_node=1), "--hold", folder=folder)
    told = cluster.show(job)
    cluster.run("scancel", job)
    assert told["StdOut"] == f"{folder}/fill-lora-{job}.log" and told["WorkDir"] == str(folder)
    assert told["Comment"].removesuffix(" ") == comment
    assert [path.name for path in tmp_path.rglob("harm")] == []
