"""What a cure says is tried: with it the same check is right, and with less of it not."""

import math
import re

import pytest

from configs.memory import USABLE
from launch.check.memory import check_memory
from launch.check.model import published_sizes

FILL = published_sizes("black-forest-labs/FLUX.1-Fill-dev")
SIZE = ("data.resolution=1024", "data.captions.text_length=512", "train.micro_batch_size=1")
LORA = (*SIZE, "method={type: lora}", "train.activation_checkpointing=false")


@pytest.mark.parametrize(
    "overrides, processes, gib, settings",
    [
        pytest.param(LORA, 1, 40, ["train.activation_checkpointing=true"], id="one is enough"),
        pytest.param(LORA, 1, 24, ["train.activation_checkpointing=true", "model.precision=int8"], id="two together"),
        pytest.param(
            (*LORA, "train.micro_batch_size=2", "data.mode=online", "data.encoder_devices=[cuda:0]"),
            1,
            16,
            [
                *("data.mode=cached data.encoder_devices=null", "train.activation_checkpointing=true"),
                "model.precision=nf4",
            ],
            id="encoders too",
        ),
        pytest.param(SIZE, 1, 80, ["parallel.engine=fsdp2-offload"], id="full on one GPU"),
        pytest.param(SIZE, 8, 80, ["parallel.engine=fsdp2"], id="full on eight GPUs"),
        pytest.param(
            (*SIZE, "parallel.engine=fsdp2", "train.ema_decay=0.99", "train.optimizer=adamw8bit"),
            2,
            80,
            ["train.ema_decay=null"],
            id="an average",
        ),
    ],
)
def test_the_fewest_settings_that_fit_are_named(overrides, processes, gib, settings, situate):
    def check(*more):
        situation = situate(*overrides, *" ".join(more).split(), processes=processes)
        (made,) = check_memory(situation, FILL, None, gpu_gib=gib, encodes=False)
        return made

    said = re.match(r"Set (.+?), with which it takes ([\d.]+) GiB; or ", check().cure)
    assert said is not None and said[1] == " ".join(settings), check().cure
    mended = check(*settings)
    assert mended.state == "ok" and f"takes about {said[2]} of" in mended.what
    for one in settings:
        assert check(*(setting for setting in settings if setting != one)).state in ("error", "warning"), one


@pytest.mark.parametrize("overrides", [LORA, SIZE, (*SIZE, "parallel.engine=fsdp2")])
def test_a_gpu_that_is_named_as_large_enough_is(overrides, situate):
    (made,) = check_memory(situate(*overrides), FILL, None, gpu_gib=12, encodes=False)
    gib = int(re.search(r"train on a GPU of (\d+) GiB or more", made.cure)[1])
    for size, state in ((gib, "ok"), (gib - 1, "warning")):
        (there,) = check_memory(situate(*overrides), FILL, None, gpu_gib=size, encodes=False)
        assert there.state == state


def test_more_gpus_are_as_many_as_do(situate):
    overrides = (*SIZE, "parallel.engine=fsdp2")
    (made,) = check_memory(situate(*overrides, processes=2), FILL, None, gpu_gib=80, encodes=False)
    count = int(re.search(r"share the state among more GPUs \(--num-processes (\d+)\)", made.cure)[1])
    for number, state in ((count // 2, "error"), (count, "ok")):
        (made,) = check_memory(situate(*overrides, processes=number), FILL, None, gpu_gib=80, encodes=False)
        assert made.state == state


def test_where_no_setting_is_enough_that_is_said(situate):
    smallest = (*LORA, "train.activation_checkpointing=true", "model.precision=nf4", "parallel.engine=ddp")
    (made,) = check_memory(situate(*smallest), FILL, None, gpu_gib=6, encodes=False)
    assert "Set " not in made.cure and made.cure.endswith(
        "No setting is enough; `fluxfill plan` knows what else there is."
    )
    gib = math.ceil(float(re.search(r"takes about ([\d.]+)", made.what)[1]) / USABLE)
    assert f"Train on a GPU of {gib} GiB" in made.cure


def test_what_encoding_is_told_fits(situate):
    def encoding(gib, *overrides):
        _, made = check_memory(situate(*LORA, *overrides), FILL, None, gpu_gib=gib, encodes=True)
        return made

    large = "data.encode_batch_size=32"
    assert encoding(24, large).cure.startswith("Set data.encode_batch_size=4, with which it takes ")
    assert encoding(24, large, "data.encode_batch_size=4").state == "ok"
    made = encoding(12, large)
    assert made.cure.startswith("Set data.encode_batch_size=4 data.encoders.t5_precision=int8, ")
    assert encoding(12, large, "data.encode_batch_size=4", "data.encoders.t5_precision=int8").state == "ok"
    assert encoding(12, large, "data.encode_batch_size=4").state != "ok"
    assert "No setting is enough" in encoding(3, large).cure
