"""Runs of a few steps, and real photographs with a hole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.loading import dump_config
from tests.ranks import run_ranks

METHODS = {"full": "method={type: full}", "lora": "method={type: lora, rank: 4, alpha: 8}"}


def train(arguments: list[str]) -> int:
    """The trainer, in a forked rank."""
    from trainer.main import train

    return train(arguments)


@pytest.fixture(scope="session")
def train_run(config, tmp_path_factory) -> Callable[..., Path]:
    """train_run(method, "key=value", ...): the folder of a run of two steps by one process, with an average; each
    method is trained once. Read only: damage a copy."""
    runs = tmp_path_factory.mktemp("evaluated")
    (runs / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    settings = ["train.steps=2", "train.warmup_steps=0", "train.global_batch_size=2", "train.micro_batch_size=2"]
    settings += ["train.ema_decay=0.5", "checkpoint.every_steps=1", "checkpoint.async=false"]
    settings += ["validation.every_steps=null", "logging.trackers=[]", f"run.dir={runs}"]

    def make(method: str, *overrides: str, name: str | None = None) -> Path:
        run = runs / (name or method)
        if not run.exists():
            line = ["--config", str(runs / "config.yaml"), f"run.name={run.name}", METHODS[method]]
            run_ranks("single", 1, train, [*line, *settings, *overrides])
        return run

    return make
