import json
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from configs.schema import CheckpointConfig, Config
from data.batches.order import OrderSettings
from data.storage.checkpoint_folders import complete_checkpoints, step_of
from trainer.checkpoints.folders import save_checkpoint
from trainer.checkpoints.keep import remove_old
from trainer.checkpoints.run_state import RunState, write_state


def config_of(run: Path, **checkpoint: Any) -> Config:
    config = load_config(Path("configs/demo.yaml"), [f"run.dir={run.parent}", f"run.name={run.name}"])
    return config.model_copy(update={"checkpoint": CheckpointConfig(**checkpoint)})


def validated(run: Path, scores: dict[int, float | None]) -> None:
    lines = [
        {"step": step, "holdout": {"hole_psnr": psnr, "loss_sigma_0.1": 1.0, "loss_sigma_0.9": psnr}, "train": {}}
        for step, psnr in scores.items()
    ]
    (run / "validation.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("keep_best, kept", [("hole_psnr", [2, 4, 5]), ("loss", [1, 4, 5]), (None, [4, 5])])
def test_the_best_one_outlives_its_time(tmp_path, keep_best, kept):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "weights").write_bytes(b"w") and None)
    validated(tmp_path, {0: 30.0, 1: 11.0, 2: 19.0, 3: 18.0, 4: None, 7: 40.0})  # 0 and 7 were not saved
    remove_old(config_of(tmp_path, keep_last=2, keep_best=keep_best))
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == kept


def test_a_validation_that_is_written_meanwhile_is_no_score_yet(tmp_path):
    for step in range(1, 4):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "weights").write_bytes(b"w") and None)
    validated(tmp_path, {1: 19.0, 2: 11.0})
    with (tmp_path / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "holdout": {"hole_p')
    remove_old(config_of(tmp_path, keep_last=1, keep_best="hole_psnr"))
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == [1, 3]


def test_the_last_one_before_a_skip_outlives_those_after_it(tmp_path):
    """Also while updates between the skips are applied: their weights may have diverged."""
    order = OrderSettings.current(seed=1, global_batch_size=1, weights={}, shards="")
    for step in range(1, 8):
        skipped = (3,) if step > 3 else ()  # the update of step 4
        state = RunState(step=step, batch=step, skips=int(step == 4), restarts=0, order=order, skipped=skipped)
        save_checkpoint(tmp_path, step, lambda folder, state=state: write_state(folder, state, {}) or {})
        remove_old(config_of(tmp_path, keep_last=1, keep_best=None))
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == [3, 7]
