"""`auto` of micro-batch and checkpointing in a run: from what a card has left, which is told to it here."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import InputError
from configs.fit import Cluster, Work
from configs.flux_shape import FluxShape
from configs.gpu_profiles import load_gpu_profile
from configs.loading import load_config
from configs.memory import CONTEXT, GIB
from configs.plan import plan_run
from launch.check.memory import check_memory
from launch.check.model import Sizes
from launch.check.situation import Situation
from launch.gpus import Gpu
from trainer.fit import DeviceMemory, fit_to_memory, room_for_activations
from trainer.method import build_transformer
from trainer.training_data import largest_bucket

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
H100 = DeviceMemory("NVIDIA H100 80GB HBM3", total=80 * GIB, free=78 * GIB, reserved=GIB, allocated=GIB)


def work(*overrides: str, recipe: str = "fill_lora", engine: str = "single") -> Work:
    config = load_config(CONFIGS / f"{recipe}.yaml", overrides)
    return Work(config, FluxShape(), engine, Cluster(load_gpu_profile("h100-80gb"), 1, 1), 4608)


def test_room_is_what_the_run_and_others_leave_of_nine_tenths():
    held = work().fixed_bytes - CONTEXT.bytes  # base, adapter, gradients, moments: about 23.4 GiB
    assert held / GIB == pytest.approx(23.4, abs=0.2)
    assert room_for_activations(work(), H100) == pytest.approx(0.9 * 80 * GIB - CONTEXT.bytes - held)
    # What is there already is not counted twice, and counts if it is more than was reckoned with.
    there = replace(H100, free=50 * GIB, reserved=29 * GIB, allocated=23 * GIB)
    assert room_for_activations(work(), there) == pytest.approx(0.9 * 80 * GIB - CONTEXT.bytes - held)
    more = replace(H100, free=50 * GIB, reserved=29 * GIB, allocated=28 * GIB)
    assert room_for_activations(work(), more) == pytest.approx((0.9 * 80 - 28) * GIB - CONTEXT.bytes)
    # Another process on the card.
    shared = replace(H100, free=70 * GIB)
    assert room_for_activations(work(), shared) == pytest.approx((0.9 * 80 - 9) * GIB - held)


VAE, TEXT = 0.31 + 2.53, 9.10  # GiB: with a picture of 1024 x 1024 in it; in bf16


@pytest.mark.parametrize(
    "gpus, overrides, gib",
    [
        (2, [], 0),
        (2, ["data.mode=online"], VAE + TEXT),
        (1, ["data.mode=online", "data.encoders.t5_precision=int8"], VAE + TEXT / 2),
        (1, ["data.mode=online", "data.encoder_devices=[cuda:1]"], 0),
        (1, ["data.mode=online", "data.encoder_devices=[cpu]"], 0),
        # Of a GPU that trains, too: a process of the machine each has encoders of its own.
        (1, ["data.mode=online", "data.encoder_devices=[cuda:0]"], VAE + TEXT),
        (3, ["data.mode=online", "data.encoder_devices=[cuda:0]"], 3 * (VAE + TEXT)),
        (3, ["data.mode=online", "data.encoder_devices=[cuda:0, cuda:7]"], 2 * (VAE + TEXT)),
        (2, ["data.mode=online", "data.encoders.t5=cpu"], VAE),
        (2, ["data.mode=online", "data.encoders.t5=cuda:1"], VAE + 2 * TEXT),
        (2, ["data.mode=online", "data.encoders.vae=cpu", "data.encoders.t5=cpu"], 0),
        (2, ["data.mode=online", "data.encoder_devices=[cuda:2]", "data.encoders.vae=cuda:0"], 2 * VAE),
    ],
)
def test_encoders_on_a_gpu_that_trains_count_alike_in_plan_check_and_run(gpus, overrides, gib):
    settled = ("train.micro_batch_size=1", "train.activation_checkpointing=true", "data.encode_batch_size=4")
    engine = "ddp" if gpus > 1 else "single"
    cluster = Cluster(load_gpu_profile("h100-80gb"), 1, gpus)
    told = []
    for config in (load_config(CONFIGS / "fill_lora.yaml", [*settled, *more]) for more in ([], overrides)):
        planned = plan_run(config, FluxShape(), cluster, tokens=4608).as_written
        situation = Situation(config, "fill_lora.yaml", (), engine, gpus, ())
        checked, *_ = check_memory(situation, Sizes(FluxShape()), None, gpu_gib=80, encodes=False)
        room = room_for_activations(Work(config, FluxShape(), engine, cluster, 4608), H100)
        parts = sum(float(line.split()[0]) for line in checked.found)
        told.append((sum(part.gib for part in planned.memory), parts, -room / GIB))
    assert [online - cached for cached, online in zip(*told, strict=True)] == pytest.approx([gib] * 3, abs=0.05)


def test_of_several_nodes_check_counts_the_gpus_of_one_that_train():
    """In a preflight the processes are those of all nodes, and a node's GPUs also those that encode."""
    encode = ["data.mode=online", "data.encoder_devices=[cuda:6, cuda:7]", "train.activation_checkpointing=true"]
    config = load_config(CONFIGS / "fill_lora.yaml", encode)
    gpus = tuple(Gpu(number, "H100", 80.0, 0.0, "", None) for number in range(8))
    taken = []
    for processes in (6, 12):
        situation = Situation(config, "fill_lora.yaml", (), "ddp", processes, gpus)
        checked, _ = check_memory(situation, Sizes(FluxShape()), None, gpu_gib=80, encodes=False)
        taken.append((checked.state, [line for line in checked.found if "VAE" in line or "T5" in line]))
    assert taken == [("ok", [])] * 2


def test_encoders_that_are_to_come_are_added_to_what_is_there():
    there = replace(H100, free=50 * GIB, reserved=29 * GIB, allocated=28 * GIB)
    room = room_for_activations(work("data.mode=online", "data.encode_batch_size=4"), there)
    assert room / GIB == pytest.approx(0.9 * 80 - 28 - 1.5 - VAE - TEXT, abs=0.05)


@pytest.fixture
def fit(config, tiny_model, engine, samples, monkeypatch, caplog):
    """fit((micro-batch, blocks), at_most=..., micro_batch_size=..., ...): (micro-batch, blocks) that are chosen where
    those just fit; (0, 0): nothing does; None: on a CPU."""
    caplog.set_level(logging.INFO, logger="fluxfill")
    transformer = build_transformer(config, tiny_model, engine)
    engine.prepare(transformer, torch.optim.AdamW)

    def choose(room: tuple[int, int] | None, *, at_most: int | None = None, **train: object) -> tuple[int, int]:
        blocks = []
        monkeypatch.setattr("trainer.fit.checkpoint_blocks", lambda _, count: blocks.append(count))
        if room is not None:
            monkeypatch.setattr("trainer.fit.device_memory", lambda _: H100)
            monkeypatch.setattr(
                "trainer.fit.room_for_activations", lambda work, _: work.cost(*room).peak if any(room) else 0
            )
        auto = {"micro_batch_size": "auto", "activation_checkpointing": "auto", "global_batch_size": 8}
        run = config.model_copy(update={"train": config.train.model_copy(update={**auto, **train})})
        return fit_to_memory(run, engine, tiny_model, samples, at_most=at_most), *blocks

    return choose


def test_a_cpu_takes_one_sample_and_keeps_its_activations(fit, caplog):
    assert fit(None) == (1, 0)
    assert "train.micro_batch_size: auto, so 1 at the largest bucket" in caplog.text
    assert "train.activation_checkpointing: auto, so 0 of 6 blocks; on a CPU" in caplog.text


def test_a_card_takes_what_it_has_room_for_and_says_why(fit, caplog):
    assert fit((8, 0)) == (8, 0)
    assert "auto, so 8 at the largest bucket and as many tokens of smaller ones; 8 x " in caplog.text
    assert fit((8, 2)) == (8, 2)
    assert "activation_checkpointing: auto, so 2 of 6 blocks; 8 x " in caplog.text
    assert fit((1, 6)) == (1, 5)  # five take less than all six, whose last one is alone in the backward pass
    assert "go out of memory" not in caplog.text
    assert fit((0, 0))[0] == 1
    assert "The run may go out of memory: ask `fluxfill plan`" in caplog.text


def test_what_a_config_names_is_taken_and_a_bound_holds_all_the_same(fit):
    assert fit((8, 0), micro_batch_size=3) == (3, 0)
    assert fit((8, 0), activation_checkpointing=2) == (8, 2)
    assert fit((0, 0), micro_batch_size=3, activation_checkpointing=True) == (3, 6)
    assert fit((8, 0), at_most=4, activation_checkpointing=2) == (4, 2)
    assert fit(None, micro_batch_size=8, at_most=4, activation_checkpointing=False) == (4, 0)
    with pytest.raises(InputError, match="has 6 blocks"):
        fit((8, 0), activation_checkpointing=7)


def test_what_did_not_fit_is_not_filled_up_again(fit, caplog):
    """Room by count is as large as before: with fewer blocks checkpointed, half the samples would fill it."""
    assert fit((8, 2)) == (8, 2)
    assert fit((8, 2), at_most=4) == (4, 6)
    assert fit((8, 0), at_most=4) == (4, 6)
    assert fit((1, 0), at_most=1) == (1, 6)
    assert fit((8, 0), micro_batch_size=8, at_most=4) == (4, 6)
    assert "activation_checkpointing: auto, so all 6 blocks: memory did not suffice before" in caplog.text


def test_the_largest_bucket_is_of_what_trains(samples):
    table = samples.table
    trains = {str(bucket) for bucket in table.bucket[table.split == "train"]}
    largest = largest_bucket(samples)
    assert str(largest) in trains
    assert largest.tokens == max(int(h) * int(w) // 256 for h, w in (name.split("x") for name in trains))
