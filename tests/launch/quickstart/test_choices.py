from itertools import product

import pytest

from configs.errors import InputError
from configs.gpu_profiles import GpuProfile, gpu_names, load_gpu_profile
from configs.loading import load_config
from configs.memory import encoders_apart
from launch.command import REPO_ROOT
from launch.gpus import count_training_gpus
from launch.quickstart.choices import choose


def card(memory_gib: float) -> GpuProfile:
    return GpuProfile(name="a card", untested=True, memory_gib=memory_gib)


@pytest.mark.parametrize("name, precision, checkpointing", [("24gb", "int8", True), ("40gb", "bf16", True)])
def test_a_base_is_quantized_where_the_card_needs_it(name: str, precision: str, checkpointing: bool) -> None:
    choices = choose(load_gpu_profile(name), num_gpus=2, num_nodes=1, online=False)
    assert (choices.precision, choices.checkpointing) == (precision, checkpointing)


def test_80_gb_hold_the_activations() -> None:
    assert not choose(load_gpu_profile("80gb"), num_gpus=2, num_nodes=1, online=False).checkpointing


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", gpu_names())
def test_what_is_chosen_fits_the_card(name: str, online: bool) -> None:
    profile = load_gpu_profile(name)
    memory = choose(profile, num_gpus=1, num_nodes=1, online=online).memory
    assert 10 < sum(memory.values()) <= 0.9 * profile.memory_gib
    assert ("encoders and their pictures" in memory) is online


def test_more_memory_never_chooses_a_coarser_base() -> None:
    order = ["nf4", "int8", "bf16"]
    for online in (False, True):
        chosen = [choose(card(gib), num_gpus=1, num_nodes=1, online=online) for gib in range(24, 200, 2)]
        places = [order.index(choices.precision) for choices in chosen]
        assert places == sorted(places) and chosen[-1].precision == "bf16" and not chosen[-1].checkpointing


def test_a_card_that_holds_nothing_is_refused_with_what_it_would_take() -> None:
    with pytest.raises(InputError, match=r"a card has 10 GiB, and a LoRA on a base in 4 bits needs 12\. Take a larger"):
        choose(card(10), num_gpus=1, num_nodes=1, online=False)
    with pytest.raises(InputError, match="or leave --online out"):
        choose(card(16), num_gpus=1, num_nodes=1, online=True)
    assert choose(card(16), num_gpus=2, num_nodes=1, online=True).precision == "nf4"


@pytest.mark.parametrize(
    "name, num_gpus, devices",
    [
        ("80gb", 1, ()),
        ("80gb", 2, ("cuda:1",)),
        ("80gb", 5, ("cuda:4",)),  # 4 x 16.0 GiB
        ("80gb", 8, ("cuda:6", "cuda:7")),
        ("24gb", 2, ("cuda:1",)),
        ("24gb", 3, ("cuda:2",)),  # 2 x 8.9 GiB, with T5 in 8 bits and less at once: else one GPU would do nothing
        ("24gb", 4, ("cuda:2", "cuda:3")),
    ],
)
def test_an_online_run_leaves_as_many_gpus_to_the_encoders_as_hold_them(
    name: str, num_gpus: int, devices: tuple[str, ...]
) -> None:
    choices = choose(load_gpu_profile(name), num_gpus=num_gpus, num_nodes=1, online=True)
    assert (choices.encoder_devices, choices.num_training) == (devices, num_gpus - len(devices))
    assert count_training_gpus(num_gpus, devices) == choices.num_training, "fluxfill train counts otherwise"


@pytest.mark.parametrize("num_gpus, devices", [(3, ("cuda:1",)), (5, ("cuda:2", "cuda:3"))])
def test_of_an_odd_number_of_small_gpus_the_last_does_nothing(num_gpus: int, devices: tuple[str, ...]) -> None:
    choices = choose(card(16), num_gpus=num_gpus, num_nodes=1, online=True)
    assert (choices.encoder_devices, choices.num_training) == (devices, num_gpus // 2)
    assert count_training_gpus(num_gpus, devices) == choices.num_training, "fluxfill train counts otherwise"


def test_what_is_chosen_fits_the_gpus_that_encode() -> None:
    cards = [card(12), card(16), *map(load_gpu_profile, gpu_names())]
    for profile, num_gpus in product(cards, (2, 3, 4, 5, 8)):
        choices = choose(profile, num_gpus=num_gpus, num_nodes=1, online=True)
        settings = [f"data.encoder_devices=[{','.join(choices.encoder_devices)}]", "data.mode=online"]
        settings += [f"data.encoders.t5_precision={choices.t5_precision}"]
        settings += [f"data.encode_batch_size={choices.encode_batch_size}"]
        data = load_config(REPO_ROOT / "configs" / "fill_lora.yaml", settings).data
        held = encoders_apart(data, choices.num_training, pixels=max(choices.resolutions) ** 2)
        assert list(held) == list(choices.encoder_devices), "one does nothing"
        assert all(sum(part.gib for part in parts) <= 0.9 * profile.memory_gib for parts in held.values())


def test_t5_in_8_bits_is_for_cards_that_hold_no_other() -> None:
    for gib, precision in ((16, "auto"), (12, "int8")):
        assert choose(card(gib), num_gpus=2, num_nodes=1, online=True).t5_precision == precision
    least = next(gib for gib in range(8, 24) if _trains(gib))
    assert choose(card(least), num_gpus=2, num_nodes=1, online=True).encoder_devices == ("cuda:1",)


def _trains(gib: int) -> bool:
    try:
        return bool(choose(card(gib), num_gpus=1, num_nodes=1, online=False))
    except InputError:
        return False


@pytest.mark.parametrize(
    "name, num_gpus, accumulation", [("24gb", 1, 2), ("40gb", 2, 4), ("80gb", 1, 2), ("80gb", 2, 4)]
)
def test_the_batch_is_the_old_accumulation(name: str, num_gpus: int, accumulation: int) -> None:
    assert (
        choose(load_gpu_profile(name), num_gpus=num_gpus, num_nodes=1, online=False).global_batch_size == accumulation
    )


def test_every_process_gets_a_sample() -> None:
    assert choose(load_gpu_profile("80gb"), num_gpus=8, num_nodes=4, online=False).global_batch_size == 32
