"""The other optimizers under every engine: they train, and go on exactly where their state can be handed on."""

from pathlib import Path

import pytest
import torch

from tests.ranks import RankFailure
from tests.trainer.engines.runs import (
    HALF,
    ROUNDING,
    SINGLE,
    STEPS,
    assert_same_run,
    furthest,
    go_on_from,
    read_losses,
    read_metrics,
    read_tensors,
    train,
)

STOCHASTIC = ("train.weights=bf16_stochastic", "train.optimizer=adamw")


@pytest.mark.fault(22, "8-bit AdamW resumed as it was")
@pytest.mark.slow
@pytest.mark.parametrize("engine, num_processes", [SINGLE, ("ddp", 2), ("fsdp2", 2), ("zero2", 2)])
def test_8_bit_adamw_trains_and_resumes_exactly(launch, undisturbed, engine, num_processes):
    name = f"8bit-{engine}-{num_processes}"
    whole = launch(engine, num_processes, name, "train.optimizer=adamw8bit").folder
    assert read_losses(whole) == pytest.approx(read_losses(undisturbed(*SINGLE).folder), rel=0.1)
    halves = go_on_from(whole, f"{name}-halves")
    launch(engine, num_processes, halves.name, "train.optimizer=adamw8bit")
    assert_same_run(halves, whole, within=0.0)


@pytest.mark.slow
def test_8_bit_state_that_the_last_rank_has_none_of_goes_on_exactly(launch):
    """Of 16 rows of 768, three ranks hold 6, 6 and 4; bitsandbytes keeps less than 4,096 elements in fp32."""
    settings = ("method={type: lora, rank: 16, targets: [net.2]}", "train.optimizer=adamw8bit")
    whole = launch("fsdp2", 3, "8bit-small", *settings).folder
    halves = go_on_from(whole, "8bit-small-halves")
    launch("fsdp2", 3, halves.name, *settings)
    assert_same_run(halves, whole, within=0.0)


@pytest.mark.fault(22, "8-bit AdamW resumed under another engine")
@pytest.mark.slow
@pytest.mark.parametrize("after", [("fsdp2", 3), ("zero2", 2), SINGLE])
def test_8_bit_state_of_another_layout_is_quantized_again(launch, after):
    """Three ranks of fsdp2 hold shards of less than 4,096 elements, too: of those bitsandbytes keeps fp32 state."""
    before = ("zero2", 3) if after[0] == "fsdp2" else ("fsdp2", 3)
    source = launch(*before, f"8bit-{before[0]}-{after[0]}", "train.optimizer=adamw8bit").folder
    halves = go_on_from(source, f"{source.name}-halves")
    launch(*after, halves.name, "train.optimizer=adamw8bit")
    assert read_losses(halves)[:HALF] == read_losses(source)[:HALF]
    assert read_losses(halves)[HALF:] == pytest.approx(read_losses(source)[HALF:], rel=0.01)


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine, num_processes", [SINGLE, ("ddp", 2), ("fsdp2", 2), ("hsdp", 4)])
def test_bf16_weights_train_near_fp32_and_go_on_bit_equal(launch, undisturbed, engine, num_processes):
    name = f"stochastic-{engine}-{num_processes}"
    whole = launch(engine, num_processes, name, *STOCHASTIC).folder
    assert read_losses(whole) == pytest.approx(read_losses(undisturbed(*SINGLE).folder), rel=0.03)
    kept = {name.split("/")[0]: tensor.dtype for name, tensor in read_tensors(whole).items()}
    bf16 = torch.bfloat16
    assert kept == {"weight": bf16, "exp_avg": bf16, "exp_avg_sq": bf16, "ema": torch.float32}
    halves = go_on_from(whole, f"{name}-halves")
    launch(engine, num_processes, halves.name, *STOCHASTIC)
    assert_same_run(halves, whole, within=0.0)


@pytest.mark.slow
def test_bf16_weights_go_on_under_another_engine_and_not_in_fp32(launch):
    whole = launch(*SINGLE, "stochastic-changes", *STOCHASTIC).folder
    halves = go_on_from(whole, "stochastic-changed")
    with pytest.raises(RankFailure, match=r"train\.weights is 'fp32_master', the run has 'bf16_stochastic'"):
        launch(*SINGLE, halves.name, "train.optimizer=adamw")
    launch("fsdp2", 3, halves.name, *STOCHASTIC)
    assert read_losses(halves) == pytest.approx(read_losses(whole), rel=0.03)


def train_rounding_to_nearest(arguments: list[str]) -> None:
    """The trainer, where bf16 weights and moments are rounded as they are everywhere else."""
    import trainer.optimizers.stochastic_adamw

    trainer.optimizers.stochastic_adamw.stochastic_round_ = lambda values, generator: values
    train(arguments)


@pytest.mark.slow
def test_at_a_small_rate_bf16_weights_learn_as_fp32_does_and_only_by_stochastic_rounding(launch):
    small = ["train.lr=3e-5", "train.lr_schedule=constant", "train.warmup_steps=0", "train.steps=60"]
    small += ["model.precision=bf16", "checkpoint.every_steps=null", "train.micro_batch_size=8"]
    end = {}
    for name, settings, function in (
        ("fp32", (), train),
        ("stochastic", STOCHASTIC, train),
        ("nearest", STOCHASTIC, train_rounding_to_nearest),
    ):
        run = launch(*SINGLE, f"learns-{name}", *small, *settings, function=function).folder
        losses = [line["loss"] for line in read_metrics(run)]
        end[name] = sum(losses[-16:]) / sum(losses[:4]) * 4 / 16
    # Of the first losses' mean; measured: 0.756, 0.756 and 0.947.
    assert end["stochastic"] == pytest.approx(end["fp32"], abs=0.01)
    assert end["nearest"] > end["fp32"] + 0.1


# --- Adafactor, Prodigy -----------------------------------------------------------------------------------------------

OPTIMIZERS = {"adafactor": ("train.optimizer=adafactor",), "prodigy": ("train.optimizer=prodigy", "train.lr=1")}


def read_unreshardable_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of an optimizer that has not one number per element."""
    from trainer.checkpoints.tensor_files import StateFiles

    return StateFiles(run / "checkpoints" / f"step-{step:08d}").read_bound(0)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adafactor_and_prodigy_are_those_of_one_process_and_go_on_exactly(launch, optimizer):
    """Their rows and columns, and what they learned of all weights, are saved by one process and read by three."""
    settings = OPTIMIZERS[optimizer]
    whole = launch(*SINGLE, optimizer, *settings).folder
    kinds = {name.rpartition("//")[2] for name in read_unreshardable_state(whole, HALF)}
    assert kinds >= ({"exp_avg_sq_row", "exp_avg_sq_col"} if optimizer == "adafactor" else {"s", "p0", "learned"})
    for number, (engine, allowed, tensors_allowed) in enumerate([(SINGLE, 0.0, 0.0), (("ddp", 3), 1e-5, ROUNDING)]):
        halves = go_on_from(whole, f"{optimizer}-halves-{number}")
        launch(*engine, halves.name, *settings)
        assert read_losses(halves) == pytest.approx(read_losses(whole), abs=allowed)
        assert furthest(read_tensors(halves, STEPS), read_tensors(whole, STEPS)) <= tensors_allowed
        states = [read_unreshardable_state(run, STEPS) for run in (halves, whole)]
        assert furthest(*states) <= tensors_allowed


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "adamw8bit"])
def test_a_run_goes_on_exactly_without_the_file_that_it_began_with(launch, tiny_model, tmp_path, optimizer):
    """A new adapter's second factor is 0, that of the file is not: where a weight began is in the checkpoint."""
    from tests.trainer.adapters.live_models import adapted, lora, train_a_little
    from trainer.adapters.files import save_adapter

    first = adapted(tiny_model, lora(rank=4, alpha=4))
    train_a_little(first)
    save_adapter(first, tmp_path)
    settings = OPTIMIZERS.get(optimizer, (f"train.optimizer={optimizer}",))
    method = "method={type: lora, rank: 4, alpha: 4}"
    whole = launch(*SINGLE, f"{optimizer}-began", method, f"method.init_from={tmp_path}", *settings).folder
    for number, (engine, allowed) in enumerate([(SINGLE, 0.0), (("ddp", 2), 1e-5)]):
        halves = go_on_from(whole, f"{optimizer}-began-halves-{number}")
        launch(*engine, halves.name, method, "method.init_from=null", *settings)
        assert_same_run(halves, whole, within=allowed)
