import pytest

from configs.legacy.draft import Draft
from configs.legacy.words import (
    DEV,
    FILL,
    TRAINS_DEV,
    TRAINS_EITHER,
    TRAINS_FILL,
    base_of,
    dataset_names,
    precision_of,
    put_base,
    put_interval,
    put_optimizer,
    run_name,
    sides,
)


@pytest.mark.parametrize(
    "old, base",
    [
        (FILL, FILL),
        (DEV, DEV),
        ("/models/FLUX.1-Fill-dev", "/models/FLUX.1-Fill-dev"),
        (r"C:\models\flux1-fill-dev.safetensors", FILL),
        ("models/flux1-dev.safetensors", DEV),
        ("/models/mine", "/models/mine"),
        ("black-forest-labs/FLUX.1-schnell", None),
        ("black-forest-labs/FLUX.1-Kontext-dev", None),
        ("ostris/Flex.1-alpha", None),
        ("Wan-AI/Anything", None),
        ("/mnt/wandb/flux1schnell", None),
        ("/home/swanson/flux1-dev.safetensors", DEV),
        ("/mnt/wandb/FLUX.1-dev/", "/mnt/wandb/FLUX.1-dev/"),
        ("swanson/FLUX.1-dev", "swanson/FLUX.1-dev"),
        (r"D:\wan\flux1-fill-dev.safetensors", FILL),
        ("/hub/models--black-forest-labs--FLUX.1-schnell/snapshots/0a1b", None),
        ("models/mine.safetensors", None),
        ("", None),
    ],
)
def test_only_models_that_fill_or_can_be_expanded_are_bases(old, base):
    assert base_of(old)[0] == base


@pytest.mark.parametrize(
    "old, told",
    [
        (FILL, TRAINS_FILL),
        ("flux1-fill-dev.safetensors", TRAINS_FILL),
        (DEV, TRAINS_DEV),
        ("models/flux1-dev.safetensors", TRAINS_DEV),
        ("/models/mine", TRAINS_EITHER),
        ("", TRAINS_EITHER),
    ],
)
def test_what_is_trained_is_told_by_the_base(old, told):
    assert put_base(Draft({"model": old}, "it"), "model", old) == told


def test_a_base_is_asked_for_where_there_is_none():
    draft = Draft({"model": "stabilityai/sdxl"}, "it")
    put_base(draft, "model", draft.get("model"))
    imported = draft.finish(())
    assert imported.config == {"model": {"base": None}} and FILL in imported.fill_in["model.base"]
    assert imported.lines[0].verdict == "no equivalent"


@pytest.mark.parametrize(
    "old, lr, optimizer, new_lr",
    [
        ("AdamW8bit", 1e-4, "adamw8bit", 1e-4),
        ("adamw_bf16", 1e-4, "adamw", 1e-4),
        ("Adafactor", 1e-3, "adafactor", 1e-3),
        ("prodigy", 1e-4, "prodigy", 1.0),
        ("Prodigy", 0.5, "prodigy", 0.5),
        ("lion8bit", 1e-5, "adamw8bit", 1e-5),
        ("automagic", 1e-5, "adamw8bit", 1e-5),
    ],
)
def test_optimizers_are_translated_with_a_rate_that_they_take(old, lr, optimizer, new_lr):
    draft = Draft({"optimizer": old, "lr": lr}, "it")
    assert put_optimizer(draft, "optimizer", old, "lr", lr) == optimizer
    assert draft.config["train"] == {"optimizer": optimizer, "lr": new_lr}


@pytest.mark.parametrize(
    "method, quantized, kind, precision",
    [
        ("lora", True, "qfloat8", "fp8"),
        ("lora", True, "fp8", "fp8"),
        ("lora", True, "qint8", "int8"),
        ("lora", True, "int8-quanto", "int8"),
        ("lora", True, "uint4|someone/adapter", "nf4"),
        ("lora", True, "qfloat8|someone/flux2-adapter", "fp8"),
        ("lora", True, "int4-quanto", "nf4"),
        ("lora", True, "int2-quanto", "nf4"),
        ("lora", True, "nf4-bnb", "nf4"),
        ("lora", True, "uint6", "int8"),
        ("lora", False, "qfloat8", "auto"),
        ("full", True, "qfloat8", "auto"),
    ],
)
def test_a_quantized_base_has_as_many_bits_as_before_or_the_next_more(method, quantized, kind, precision):
    assert precision_of(method, quantized, kind)[0] == precision


def test_resolutions_names_and_runs_are_as_the_schema_takes_them():
    assert sides([1010, 512, 512, float("inf"), float("nan"), 1]) == [32, 512, 1008, 4096]
    assert sides([]) == [1024]
    assert run_name(" red sofa/2 ") == "red-sofa-2" and run_name("红") == "imported"
    assert dataset_names(["/a/sofas", r"D:\b\sofas", "/a/b c/", ""]) == ["sofas", "sofas-2", "b-c", "pictures"]
    assert dataset_names(["/a/b-3", "/a/b", "/c/b", "/d/b"]) == ["b-3", "b", "b-2", "b-4"]


@pytest.mark.parametrize(
    "old, samples, every",
    [
        ({"steps": 40, "epochs": 1}, 20, 40),
        ({"steps": 0, "epochs": 2}, 20, 10),
        ({"steps": "", "epochs": 0}, 20, None),
        ({"epochs": 0}, None, None),
        ({"steps": 0, "epochs": 2}, None, "the default"),
        ({"steps": None}, 20, "the default"),
        ({"other": 1}, 20, "the default"),
    ],
)
def test_an_interval_of_0_is_off_and_one_that_is_not_known_is_the_default(old, samples, every):
    draft = Draft(old, "it")
    put_interval(draft, ["steps"], "epochs", "checkpoint.every_steps", samples, 4)
    assert draft.config.get("checkpoint", {}).get("every_steps", "the default") == every
    assert all(old[key] for key in draft.open_keys()), "each 0 is answered"
