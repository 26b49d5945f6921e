"""The recipe as a whole: one short run by one process."""

import json
import math

from configs.loading import dump_config
from tests.ranks import run_ranks


def train(arguments: list[str]) -> int:
    from trainer.main import train

    return train(arguments)


def test_a_run_returns_its_last_step_and_leaves_what_it_is_for(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    settings = [f"run.dir={tmp_path}", "run.name=short", "train.steps=3", "train.warmup_steps=0"]
    settings += [
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "validation.every_steps=3",
        "checkpoint.every_steps=2",
    ]
    assert run_ranks("single", 1, train, ["--config", str(path), *settings]) == [3]
    run = tmp_path / "short"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(math.isfinite(line["loss"]) for line in lines)
    validated = [json.loads(line)["step"] for line in (run / "validation.jsonl").read_text().splitlines()]
    assert validated == [0, 3]
    saved = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000003"]
    assert (run / "final" / "model_index.json").is_file()
