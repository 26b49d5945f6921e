"""Adapters under every engine: each file of theirs is that of one process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.engines.runs import (
    HALF,
    SINGLE,
    assert_same_run,
    furthest,
    go_on_from,
    read_metrics,
    slow,
)

METHODS = {
    "lora": "method={type: lora, rank: 8, alpha: 16}",
    "dora": "method={type: dora, rank: 8, alpha: 16}",
    "lokr": "method={type: lokr, rank: 2, alpha: 4, factor: 4}",
}
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def method_alone(launch) -> Callable[[str], Path]:
    """The folder of a run of a method by one process, made once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = launch(*SINGLE, f"{method}-alone", METHODS[method]).folder
        return made[method]

    return run


@pytest.mark.parametrize(
    "method, engine, num_processes",
    [
        *(("lora", "ddp", 2), ("lora", "fsdp2", 2)),
        *slow(*(("lora", engine, 2) for engine in ("zero2", "zero3"))),
        *slow(*(("dora", engine, 2) for engine in ("ddp", "fsdp2", "zero2", "zero3"))),
        *slow(*(("lokr", engine, 4 if engine == "hsdp" else 2) for engine in ("fsdp2", "hsdp", "zero3"))),
    ],
)
def test_an_adapter_is_that_of_one_process_in_every_file_of_it(launch, method_alone, method, engine, num_processes):
    from safetensors.torch import load_file

    alone = method_alone(method)
    run = launch(engine, num_processes, f"{method}-{engine}", METHODS[method]).folder
    assert_same_run(run, alone, within=1e-5)
    for place in ("final", f"checkpoints/step-{HALF:08d}/adapter", "final-ema"):
        assert furthest(load_file(run / place / FILE), load_file(alone / place / FILE)) < 1e-5
    adapter = load_file(run / "final" / FILE)
    assert furthest(adapter, load_file(run / "final-ema" / FILE)) > 1e-4
    assert method != "lora" or any(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)  # it learned


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "lokr"])
def test_dora_and_lokr_go_on_exactly_and_under_another_engine(launch, method_alone, method):
    alone = method_alone(method)
    for engine, allowed in ((SINGLE, 0.0), (("fsdp2", 2), 1e-5)):
        halves = go_on_from(alone, f"{method}-then-{engine[0]}")
        launch(*engine, halves.name, METHODS[method])
        assert_same_run(halves, alone, within=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_in_bf16_too_every_adapter_starts_at_the_base(launch, engine):
    """The first loss is that of the base, whatever dtype the engine hands the adapter's weights out in."""
    losses = set()
    for method, settings in METHODS.items():
        short = ("model.precision=bf16", "train.steps=1", "train.warmup_steps=0")
        run = launch(engine, 2, f"bf16-{engine}-{method}", settings, *short).folder
        losses.add(read_metrics(run)[0]["loss"])
    assert len(losses) == 1
