from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from benchmarks.gpu import KINDS, TOLERANCE
from benchmarks.gpu_case import Clock, _Enough, _patched, distances, measure, parity
from trainer.model.attention import choose_attention


@pytest.mark.parametrize("kind", ["bf16", "rounded"])
def test_a_wrong_attention_kernel_is_further_off_than_bf16_is_from_fp32(tmp_path, kind):
    settings = KINDS[kind].settings
    expected = parity("expected", settings, folder=tmp_path)
    full = [part for part in settings if part.startswith("method=")]
    precise = parity("precise", [*full, "model.precision=fp32"], folder=tmp_path)
    assert 0 < distances(precise, expected)["furthest"] < TOLERANCE / 3

    attend = functional.scaled_dot_product_attention

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: object) -> torch.Tensor:
        return attend(query, key / 2 + key.detach() / 2, value, **named)  # right but for half of a gradient

    with mock.patch.object(functional, "scaled_dot_product_attention", wrong):
        found = parity("wrong", settings, folder=tmp_path)
    apart = distances(found, expected)
    assert apart["loss"] == 0 and apart["furthest"] > 2 * TOLERANCE


def test_the_attention_kernels_of_a_run_are_not_those_of_the_seeds_way_behind_it():
    before = torch._C._get_sdp_priority_order()
    with _patched():
        choose_attention("math", torch.device("cpu"), torch.float32, head=32)
        assert torch._C._get_sdp_priority_order() != before
    assert torch._C._get_sdp_priority_order() == before


def test_a_gradient_that_is_not_finite_or_not_there_is_no_parity(tmp_path):
    tensors = {"loss": torch.tensor(2.0), "0": torch.ones(3), "1": torch.ones(2)}
    save_file(tensors, tmp_path / "expected")
    save_file({**tensors, "0": torch.tensor([1.0, float("nan"), 1.0])}, tmp_path / "nan")
    assert not distances(tmp_path / "nan", tmp_path / "expected")["furthest"] <= TOLERANCE
    del tensors["1"]
    save_file(tensors, tmp_path / "fewer")
    with pytest.raises(ValueError, match="not the same tensors"):
        distances(tmp_path / "fewer", tmp_path / "expected")


def test_planned_memory_and_work_follow_the_settings(tmp_path):
    def line(name: str, *settings: str, side: int = 1024) -> dict:
        return measure(name, side, 2, settings, tiny=True, folder=tmp_path)

    lora, full = line("lora", *KINDS["bf16"].settings), line("full", *KINDS["adamw8bit"].settings)
    assert full["planned_gib"] > lora["planned_gib"]
    assert full["tflop_per_sample"] > lora["tflop_per_sample"] > line("small", side=512)["tflop_per_sample"]
    assert lora["micro_batch_size"] == 1 and lora["samples_per_step"] == 2
    again = line("again", "train.activation_checkpointing=true")
    assert again["checkpointed"] == 3 and again["tflop_per_sample"] == lora["tflop_per_sample"]  # MFU counts it once


def test_the_clock_leaves_out_the_warm_up_and_stops_when_it_has_enough():
    clock = Clock(warm_up=2, least=3, seconds=0)
    for step in range(4):
        clock.step(float(step))
    with pytest.raises(_Enough):
        clock.step(4.0)
    assert clock.found["steps"] == 3 and clock.found["first_loss"] == 0.0
    assert clock.found["seconds_per_step"] > 0
