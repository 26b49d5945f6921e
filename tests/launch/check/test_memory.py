import pytest

from launch.check.memory import check_memory, largest_tokens
from launch.check.model import Sizes, published_sizes
from launch.check.pictures import check_pictures
from launch.gpus import Gpu

FILL = published_sizes("black-forest-labs/FLUX.1-Fill-dev")
LORA = ("method={type: lora}", "data.resolution=1024", "data.captions.text_length=512", "train.micro_batch_size=1")


@pytest.mark.parametrize(
    "overrides, gib, state, words",
    [
        (LORA, 80, "ok", "27.8 of 80.0 GiB"),
        (LORA, 30, "warning", "which is tight"),
        (LORA, 24, "error", "Set model.precision=int8, with which it takes 16.8 GiB"),
        ((*LORA, "model.precision=nf4"), 24, "ok", "of 24.0 GiB"),
        (
            (*LORA, "train.micro_batch_size=2", "train.activation_checkpointing=false"),
            70,
            "error",
            "micro_batch_size=1",
        ),
        ((*LORA[1:], "train.optimizer=adamw"), 80, "error", "parallel.engine=fsdp2"),
    ],
)
def test_a_real_model_is_held_against_a_named_gpu(overrides, gib, state, words, situate):
    (made,) = check_memory(situate(*overrides), FILL, None, gpu_gib=gib, encodes=False)
    assert made.state == state, made
    assert words in f"{made.what} {made.cure}" and len(made.found) > 3


@pytest.mark.parametrize("key", ["train.micro_batch_size=auto", "train.activation_checkpointing=auto"])
def test_the_least_that_a_run_takes_is_not_told_as_all_where_it_decides_itself(key, situate):
    settled = (*LORA, "train.activation_checkpointing=true")
    (made,) = check_memory(situate(*settled, key), FILL, None, gpu_gib=80, encodes=False)
    assert "auto takes more" in made.what
    (made,) = check_memory(situate(*settled), FILL, None, gpu_gib=80, encodes=False)
    assert "auto" not in made.what


def test_sharded_over_more_gpus_is_the_cure_of_fsdp(situate):
    situation = situate(*LORA[1:], "parallel.engine=fsdp2", processes=2)
    (made,) = check_memory(situation, FILL, None, gpu_gib=80, encodes=False)
    assert made.state == "error" and "more GPUs" in made.cure


def test_hsdp_shares_among_the_gpus_of_a_node_and_not_of_the_run(situate):
    gpus = tuple(Gpu(index, "NVIDIA", 80.0, 0.0, "580.1", (9, 0)) for index in range(8))
    found = []
    for engine, processes in (("fsdp2", 8), ("hsdp", 32)):
        situation = situate(*LORA[1:], f"parallel.engine={engine}", gpus=gpus, processes=processes)
        (made,) = check_memory(situation, FILL, None, gpu_gib=None, encodes=False)
        found.append(made.found)
    assert found[0] == found[1]


def test_the_smallest_gpu_of_the_machine_decides(situate):
    gpus = tuple(Gpu(index, "NVIDIA", gib, 0.0, "580.1", (9, 0)) for index, gib in enumerate((80.0, 24.0)))
    (made,) = check_memory(situate(*LORA, gpus=gpus), FILL, None, gpu_gib=None, encodes=False)
    assert made.state == "error" and "of 24.0 GiB" in made.what


def test_a_card_of_24_gb_preprocesses_at_its_defaults_and_is_told_what_would_be_too_much(situate):
    _, encoding = check_memory(situate(*LORA, "data.encode_batch_size=32"), FILL, None, gpu_gib=24, encodes=True)
    assert "preprocessing takes about" in encoding.what and encoding.state == "error"
    assert "data.encode_batch_size" in encoding.cure
    _, encoding = check_memory(situate(*LORA), FILL, None, gpu_gib=24, encodes=True)
    assert encoding.state == "ok"


def test_encoders_on_the_gpu_that_trains_are_counted_with_it(situate):
    online = (*LORA, "data.mode=online", "data.encode_batch_size=1")
    (beside,) = check_memory(situate(*online), FILL, None, gpu_gib=80, encodes=False)
    apart, there = check_memory(
        situate(*online, "data.encoder_devices=[cuda:1]"), FILL, None, gpu_gib=80, encodes=False
    )
    assert any("T5" in line for line in beside.found) and not any("T5" in line for line in apart.found)
    assert there.state == "ok" and there.what.startswith("encoding for others, on cuda:1, takes about 13.4 of 80.0 GiB")


def test_a_gpu_that_encodes_for_many_is_held_against_what_all_of_them_load_there(situate):
    online = (*LORA, "data.mode=online", "data.encode_batch_size=1", "data.encoder_devices=[cuda:7]")
    gpus = tuple(Gpu(index, "NVIDIA", 80.0, 0.0, "580.1", (9, 0)) for index in range(8))
    _, made = check_memory(situate(*online, gpus=gpus), FILL, None, gpu_gib=None, encodes=False)
    assert made.state == "error" and "takes about 94.1 of 80.0 GiB" in made.what  # 7 x (0.31 + 2.53 + 9.10 + 1.5)
    assert made.cure.startswith("Set data.encoders.t5_precision=int8, with which it takes 62.2 GiB")


def test_without_a_gpu_a_large_model_is_a_warning_and_a_small_one_is_not(situate):
    (made,) = check_memory(situate(*LORA), FILL, None, gpu_gib=None, encodes=True)
    assert made.state == "warning" and "--gpu 80GB" in made.cure
    small = Sizes(type(FILL.shape)(2, 4, 192, 32, 64, 32))
    (made,) = check_memory(situate(), small, None, gpu_gib=None, encodes=True)
    assert made.state == "ok"


def test_the_largest_bucket_counts(situate, progress):
    assert largest_tokens(situate("data.resolution=[512, 1024]"), None) == 4096
    pictures, _ = check_pictures(situate(), progress)
    assert largest_tokens(situate(), pictures.samples) == max(sample.bucket.tokens for sample in pictures.samples)
