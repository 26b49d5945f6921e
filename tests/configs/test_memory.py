"""The formulas of memory against what was counted on FLUX.1, and against tensors that are really there."""

from pathlib import Path

import pytest
import torch

from configs.errors import InputError
from configs.flux_shape import FluxShape
from configs.loading import load_config
from configs.memory import (
    GIB,
    base_bytes,
    checkpoint_bytes,
    encoders_apart,
    encoding_memory,
    training_memory,
    training_state,
)
from configs.schema import Config
from trainer.model.flux import load_transformer
from trainer.model.quantize import quantize_base
from trainer.optimizers.optimizer import build_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOKENS = 4608  # 1024 px and 512 tokens of text


def total(recipe: str, *overrides: str, engine: str = "single", processes: int = 1, tokens: int = TOKENS) -> float:
    """GiB of a recipe with FLUX.1's sizes."""
    config = load_config(CONFIGS / f"{recipe}.yaml", overrides)
    return sum(part.gib for part in training_memory(config, FluxShape(), engine, processes=processes, tokens=tokens))


@pytest.mark.parametrize(
    "recipe, overrides, engine, processes, gib",
    [
        ("fill_lora", [], "single", 1, 24.8 + 1.5),  # the peak of the counted run, and the context
        ("fill_lora", ["train.activation_checkpointing=false"], "single", 1, 22.7 + 26.4 + 2),
        ("fill_lora", ["model.precision=nf4"], "single", 1, 10.5 + 1),
        ("fill_full", ["train.ema_decay=null", "train.optimizer=adamw"], "zero1", 8, 61.0 + 4.3 + 3.7),  # and buckets
        (
            "fill_full",
            ["train.ema_decay=null", "train.optimizer=adamw"],
            "zero2",
            8,
            41.6 + 4.3 + 3.7 + 2.8,
        ),  # and gradients in fp32
        ("fill_full", ["train.ema_decay=null", "train.optimizer=adamw"], "fsdp2", 8, 22.2 + 7.5),
        (
            "fill_full",
            ["train.ema_decay=null", "train.optimizer=adamw", "train.weights=bf16_stochastic"],
            "fsdp2",
            8,
            11.1 + 7.5,
        ),
    ],
)
def test_the_sum_is_near_what_was_counted(recipe, overrides, engine, processes, gib):
    assert total(recipe, *overrides, engine=engine, processes=processes) == pytest.approx(gib, rel=0.1)


def test_more_tokens_more_gpus_and_fewer_bits_change_it_as_they_should():
    assert total("fill_lora", tokens=2 * TOKENS) > total("fill_lora")
    assert total("fill_lora", "train.micro_batch_size=2") == pytest.approx(total("fill_lora", tokens=2 * TOKENS))
    for smaller, larger in (("nf4", "int8"), ("int8", "bf16"), ("bf16", "fp32")):
        assert total("fill_lora", f"model.precision={smaller}") < total("fill_lora", f"model.precision={larger}")
    full = [total("fill_full", engine="fsdp2", processes=count) for count in (2, 4, 8)]
    assert full == sorted(full, reverse=True)
    assert total("fill_full", engine="fsdp2-offload", processes=2) < total("fill_full", engine="fsdp2", processes=2) / 2


def test_every_part_says_where_its_number_comes_from():
    config = load_config(CONFIGS / "fill_full.yaml", ["train.ema_decay=0.999"])
    for engine in ("ddp", "fsdp2", "zero3"):
        parts = training_memory(config, FluxShape(), engine, processes=8, tokens=TOKENS)
        assert parts and all(part.source and part.bytes > 0 for part in parts)


# Bytes that a trained weight takes with its gradient and optimizer state, for every pair that is not refused. Others
# have 12 (bf16 moments beside fp32 weights) and 6 (8-bit moments beside bf16 weights): no key gives those here.
STATES = {
    ("fp32_master", "adamw"): 16,
    ("fp32_master", "adamw8bit"): 10 + 2 * 4 / 256,
    ("fp32_master", "adafactor"): 8,
    ("fp32_master", "prodigy"): 24,
    ("bf16_stochastic", "adamw"): 8,
}


def stated(config: Config) -> float:
    """Bytes a parameter, by the formula, where nothing is shared."""
    parts = training_state(config, FluxShape(), "fsdp2", 1)
    assert [part.what for part in parts if part.bytes][:2] == ["trained weights", "gradients"]
    return sum(part.bytes for part in parts) / FluxShape().parameters


@pytest.mark.parametrize("weights", ["fp32_master", "bf16_stochastic"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "prodigy"])
def test_a_trained_weight_takes_what_is_really_kept_of_it(weights, optimizer):
    overrides = [f"train.optimizer={optimizer}", f"train.weights={weights}", "train.lr=1.0", "train.ema_decay=null"]
    overrides.append("parallel.engine=ddp")  # which goes with all of them
    if (weights, optimizer) not in STATES:
        with pytest.raises(InputError, match="stochastic rounding is part of AdamW"):
            load_config(CONFIGS / "fill_full.yaml", overrides)
        return
    config = load_config(CONFIGS / "fill_full.yaml", overrides)
    assert stated(config) == pytest.approx(STATES[weights, optimizer], rel=0.01)

    dtype = torch.bfloat16 if weights == "bf16_stochastic" else torch.float32
    weight = torch.nn.Parameter(torch.randn(512, 512, dtype=dtype))  # small tensors have no 8-bit state
    weight.grad = torch.ones_like(weight)
    built = build_optimizer([weight], config.train)
    built.step()
    state = [value for value in built.state[weight].values() if isinstance(value, torch.Tensor)]
    kept = [weight, weight.grad, *(tensor for tensor in state if tensor.numel() > 300)]  # not the table of 8-bit codes
    assert sum(tensor.nbytes for tensor in kept) / weight.numel() == pytest.approx(stated(config), rel=0.01)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_base_of_8_bits_takes_what_its_tensors_do(tiny_model, precision):
    transformer = load_transformer(tiny_model, dtype=torch.bfloat16)
    quantize_base(transformer, precision, lambda tensor: tensor.detach().clone())
    found = sum(tensor.nbytes for tensor in (*transformer.parameters(), *transformer.buffers()))
    config = load_config(CONFIGS / "fill_lora.yaml", [f"model.precision={precision}"])
    assert base_bytes(config, FluxShape.of(transformer.config)) == pytest.approx(found, rel=1e-3)


def test_an_adapters_states_are_those_that_were_published():
    """16 bytes a parameter: a LoRA of rank 16 on all of the blocks' linear layers takes 1.05 GB."""
    config = load_config(CONFIGS / "fill_lora.yaml", ["method.rank=16", "train.optimizer=adamw"])
    parts = training_state(config, FluxShape(), "ddp", 8)
    assert sum(part.bytes for part in parts) / 1e9 == pytest.approx(1.05, rel=0.01)


@pytest.mark.parametrize("batch, gib", [(1, 2.84), (4, 2.84), (32, 20.54)])
def test_pictures_in_the_vae_take_what_was_counted(batch, gib):
    config = load_config(CONFIGS / "fill_lora.yaml", [f"data.encode_batch_size={batch}", "data.encoders.t5=cpu"])
    parts = encoding_memory(
        config.data, text_parameters=4_885_000_000, vae_parameters=83_819_683, vae_width=128, pixels=1024 * 1024
    )
    assert sum(part.gib for part in parts) == pytest.approx(gib, rel=0.02)


def test_text_encoders_count_where_they_share_the_gpu():
    def text(*overrides: str) -> list[float]:
        config = load_config(CONFIGS / "fill_lora.yaml", overrides)
        parts = encoding_memory(config.data, text_parameters=GIB, vae_parameters=1, vae_width=128, pixels=1)
        return [part.gib for part in parts if "T5" in part.what]

    assert text() == [2.0] and text("data.encoders.t5_precision=int8") == [1.0] and text("data.encoders.t5=cpu") == []
    assert text("data.encoders.t5=cuda") == [2.0], "the process's own, as the VAE's is"
    assert text("data.encoders.t5=cuda:1") == []


@pytest.mark.parametrize(
    "training, overrides, held",
    [
        (2, ["data.encoder_devices=[cuda:2]"], {"cuda:2": (2, 2, 2)}),
        (3, ["data.encoder_devices=[cuda:3, cuda:10, cpu]"], {"cuda:3": (1, 1, 1), "cuda:10": (1, 1, 1)}),
        (3, ["data.encoder_devices=[cuda:10, cuda:3]"], {"cuda:3": (1, 1, 1), "cuda:10": (2, 2, 2)}),
        (2, ["data.encoder_devices=[cuda:2]", "data.encoders.t5=cuda:3"], {"cuda:2": (2, 0, 2), "cuda:3": (0, 2, 2)}),
        (2, ["data.encoder_devices=[cuda:2]", "data.encoders.t5=cpu"], {"cuda:2": (2, 0, 2)}),
        (2, ["data.encoder_devices=[cuda:0]"], {}),
        (2, [], {}),
    ],
)
def test_a_gpu_that_encodes_for_others_holds_an_encoder_and_a_context_of_each(training, overrides, held):
    config = load_config(CONFIGS / "fill_lora.yaml", ["data.mode=online", *overrides])
    sizes = {"text_parameters": GIB // 2, "vae_parameters": GIB // 4, "vae_width": 128}
    found = encoders_apart(config.data, training, pixels=1, **sizes)
    assert list(found) == list(held)
    for name, (vae, text, contexts) in held.items():
        whole = sum(part.gib for part in found[name] if "megapixels" not in part.what)
        assert whole == pytest.approx(vae + text + 1.5 * contexts)


def test_a_checkpoint_of_a_full_fine_tune_is_as_large_as_was_counted():
    config = load_config(CONFIGS / "fill_full.yaml")  # with an average
    one, end = checkpoint_bytes(config, FluxShape())
    assert one / GIB == pytest.approx(111, rel=0.01)
    assert end / GIB == pytest.approx(2 * 22.2, rel=0.01)
