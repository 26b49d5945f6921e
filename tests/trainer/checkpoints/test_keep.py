import json
from pathlib import Path

import pytest

from configs.schema import CheckpointConfig
from trainer.checkpoints.folders import complete_checkpoints, save_checkpoint, step_of
from trainer.checkpoints.keep import remove_old


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
    remove_old(tmp_path, CheckpointConfig(keep_last=2, keep_best=keep_best))
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == kept
