from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load, load_file

from configs.errors import InputError
from data.cache.open_cache import open_cache
from data.cache.shard_index import read_index
from data.cache_layout import EMPTY_TEXT
from data.encoders.stored_text import dequantize_tokens, quantize_tokens, store_text
from data.preprocessing.run import preprocess
from tests.data.made_caches import index_of


def tokens_of(kind: str) -> torch.Tensor:
    """fp32 [B, L, D]: noise; as T5's output, small with a few large channels; or numbers of very different size."""
    random = torch.Generator().manual_seed(3)
    t5 = torch.randn(4, 32, 256, generator=random)
    if kind == "outliers":
        t5 *= 0.1
        t5[..., 7], t5[..., 100] = 30.0, -11.0
    elif kind == "scales":
        t5 *= 10.0 ** torch.linspace(-30, 30, 32)[None, :, None]
    return t5


@pytest.mark.parametrize("kind", ["noise", "outliers", "scales"])
def test_the_error_is_at_most_half_the_tokens_scale(kind):
    t5 = tokens_of(kind)
    steps, scale = quantize_tokens(t5)
    assert (steps.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, t5.shape[:2])
    exact = steps.double() * scale.double().unsqueeze(-1)
    error = (exact - t5.double()).abs()
    assert (error <= scale.double().unsqueeze(-1) * 0.5 * (1 + 1e-6)).all()
    # What training gets is that in bf16: 2^-9 of the number more.
    bf16 = dequantize_tokens(steps, scale)
    assert bf16.dtype == torch.bfloat16
    assert ((bf16.double() - exact).abs() <= exact.abs() * 2.0**-8).all()


def test_the_scale_is_the_largest_number_over_127_and_every_step_is_used():
    t5 = tokens_of("noise")
    steps, scale = quantize_tokens(t5)
    assert torch.equal(scale, t5.abs().amax(dim=-1) / 127)
    assert (steps.abs().amax(dim=-1) == 127).all()
    assert steps.min() >= -127, "symmetric: -128 has no partner"


def test_a_token_of_zeros_stays_zeros():
    t5 = tokens_of("noise")
    t5[1, 2] = 0
    steps, scale = quantize_tokens(t5)
    assert scale[1, 2] == 0 and not steps[1, 2].any()
    assert not dequantize_tokens(steps, scale)[1, 2].any()


def test_every_token_has_a_scale_of_its_own():
    t5 = tokens_of("noise")
    louder = t5.clone()
    louder[0, 0] *= 1000
    for one, two in zip(quantize_tokens(t5), quantize_tokens(louder), strict=True):
        assert torch.equal(one[0, 1:], two[0, 1:]) and torch.equal(one[1:], two[1:])


def test_stored_texts_have_the_types_that_the_manifest_promises():
    t5, pooled = tokens_of("noise")[0], torch.ones(5)
    assert {name: tensor.dtype for name, tensor in store_text(t5, pooled, "bf16").items()} == {
        "t5": torch.bfloat16,
        "pooled": torch.bfloat16,
    }
    assert {name: tensor.dtype for name, tensor in store_text(t5, pooled, "int8").items()} == {
        "t5": torch.int8,
        "t5_scale": torch.float32,
        "pooled": torch.bfloat16,
    }


def test_a_cache_of_8_bits_is_one_of_its_own_and_its_texts_are_those_of_the_other_up_to_a_step(
    cache, demo_config, tmp_path
):
    config = demo_config(tmp_path / "cache", "data.captions.text_dtype=int8")
    preprocess(config, Console(quiet=True))
    ours = open_cache(config, Path(config.model.base))
    assert ours.manifest.text_dtype == "int8"
    with pytest.raises(InputError, match=r"data.captions.text_dtype is 'bf16', the cache was made with 'int8'"):
        open_cache(demo_config(tmp_path / "cache"), Path(config.model.base))
    texts, twins = ({path: read_texts(of, path) for path in of.table.path.tolist()} for of in (ours, cache))
    assert texts.keys() == twins.keys(), "small texts: the plan is the same"
    num_texts = 0
    for path, stored in texts.items():
        for text, twin in zip(stored, twins[path], strict=True):
            num_texts += 1
            t5 = dequantize_tokens(text["t5"], text["t5_scale"]).float()
            # Half a step, and the rounding to bf16 of either side.
            limit = text["t5_scale"][:, None] / 2 + twin["t5"].float().abs() * 2.0**-7
            assert ((t5 - twin["t5"].float()).abs() <= limit).all()
            assert torch.equal(text["pooled"], twin["pooled"])
    assert num_texts > 0
    assert load_file(ours.folder / EMPTY_TEXT)["t5"].dtype == torch.int8


def read_texts(cache, path: str) -> list[dict[str, torch.Tensor]]:
    index, data = read_index(index_of(cache.folder / path)), (cache.folder / path).read_bytes()
    return [load(data[offset : offset + size]) for offset, size in index.texts.tolist()]
