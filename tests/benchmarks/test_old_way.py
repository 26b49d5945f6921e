import pytest
import torch

from benchmarks.mid_size import ROOT, published_parts
from benchmarks.old_way import count, count_parameters, count_step, on_meta, training_gib
from configs.flux_shape import FluxShape
from launch.check.model import Sizes


def test_the_published_networks_have_the_published_parameters():
    parts = {name: count_parameters(part) for name, part in on_meta().items()}
    sizes = Sizes(FluxShape())
    assert parts["transformer"] == sizes.shape.parameters
    assert parts["vae"] == sizes.vae
    assert parts["text_encoder"] + parts["text_encoder_2"] == sizes.text


def test_operations_are_those_of_the_matrices():
    """T5 by hand: two for each weight of its layers and each token, and attention's two products."""
    tokens, width, inner = 16, 512, 1280
    by_hand = 24 * (2 * tokens * (4 * width * width + 3 * width * inner) + 4 * tokens**2 * width)
    with torch.device("meta"):
        (t5,) = published_parts(8, names=("text_encoder_2",)).values()
    assert count(lambda: t5(torch.zeros(1, tokens, dtype=torch.long, device="meta"))) == by_hand


@pytest.mark.parametrize("page", ["docs/comparison.md", "docs/zh/comparison.md"])
def test_the_page_has_the_memory_that_a_plan_counts_today(page):
    assert f"| {training_gib():.1f} |" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.slow
def test_checkpointing_adds_a_forward_pass():
    kept, again = (count_step(on_meta(8), side=64, text_length=16, checkpointing=each) for each in (False, True))
    assert 1.2 < again["transformer"] / kept["transformer"] < 1.6
    assert 1 < again["plain_step"] < kept["plain_step"]
