"""Adapters under every engine: each file of theirs is that of one process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.engines.runs import (
    HALF,
    ROUNDING,
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
# The base's own output outside the hole is computed with the adapter off, between the passes of every micro-step.
FLOW = ("flow.keep_target=base", "flow.unmasked_probability=0.3", "flow.keep_weight=0.7")
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def method_alone(launch) -> Callable[[str], Path]:
    """The folder of a run of a method by one process, made once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = launch(*SINGLE, f"{method}-alone", METHODS[method], *FLOW).folder
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
    run = launch(engine, num_processes, f"{method}-{engine}", METHODS[method], *FLOW).folder
    assert_same_run(run, alone, within=1e-5, tensors_within=ROUNDING)
    for place in ("final", f"checkpoints/step-{HALF:08d}/adapter", "final-ema"):
        assert furthest(load_file(run / place / FILE), load_file(alone / place / FILE)) < ROUNDING
    adapter = load_file(run / "final" / FILE)
    assert furthest(adapter, load_file(run / "final-ema" / FILE)) > 2 * ROUNDING
    assert method != "lora" or any(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)  # it learned


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "lokr"])
def test_dora_and_lokr_go_on_exactly_and_under_another_engine(launch, method_alone, method):
    alone = method_alone(method)
    for engine, allowed, tensors_allowed in ((SINGLE, 0.0, 0.0), (("fsdp2", 2), 1e-5, ROUNDING)):
        halves = go_on_from(alone, f"{method}-then-{engine[0]}")
        launch(*engine, halves.name, METHODS[method], *FLOW)
        assert_same_run(halves, alone, within=allowed, tensors_within=tensors_allowed)


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


@pytest.mark.parametrize("engines", [[SINGLE, ("ddp", 2)], *slow([[("fsdp2", 2), ("zero3", 2)]])])
def test_the_first_loss_is_that_of_the_adapter_that_goes_on(launch, tiny_model, tmp_path, engines):
    """A file of sd-scripts against a base that has its weights added by hand."""
    from tests.trainer.adapters.other_trainers import (
        BLOCK_TARGETS,
        BLOCKS,
        changes_of,
        merged,
        random_lora,
        write_lora,
    )

    made = random_lora(BLOCKS, alpha=2.0)
    file = write_lora(made, tmp_path / "kohya.safetensors", prefix="lora_unet_", flat=True)
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    merged(tiny_model, changes_of(made)).save_pretrained(base / "transformer")

    def first_loss(engine: str, num_processes: int, name: str, method: str, *overrides: str) -> float:
        short = ("train.steps=1", "train.warmup_steps=0", f"method={method}")
        # The engines' case is in the name: the folder of runs outlives it, and a run that is done isn't trained again.
        run = launch(engine, num_processes, f"{name}-{engine}-with-{engines[-1][0]}", *short, *overrides).folder
        return read_metrics(run)[0]["loss"]

    new = f"{{type: lora, rank: 8, alpha: 16, targets: [{', '.join(BLOCK_TARGETS)}]}}"
    expected = first_loss(*SINGLE, "merged", new, f"model.base={base}")
    for engine in engines:
        goes_on = new.replace("}", f", init_from: {file}}}")
        assert first_loss(*engine, "goes-on", goes_on) == pytest.approx(expected, rel=1e-5)
    assert abs(first_loss(*SINGLE, "new", new) - expected) > 0.01 * expected
