import torch

from tests.trainer.adapters.live_models import DORA, adapted, velocity_of
from trainer.adapters.dora import row_norms
from trainer.adapters.files import ADAPTER
from trainer.model.flux import load_transformer


def test_norms_are_those_of_the_changed_rows():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2)))
    expected = (weight.double() + 3 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, 3).double(), expected)
    assert row_norms(weight.bfloat16(), a, b, 3).dtype == torch.float32


def test_dora_on_dev_adapts_the_new_inputs_too(tiny_dev_model, tmp_path, rows):
    live = adapted(tiny_dev_model, DORA, expanded=True)
    base = load_transformer(tiny_dev_model, dtype=torch.float32)
    assert torch.equal(velocity_of(live, rows), velocity_of(base, rows))
    assert live.x_embedder.lora_A[ADAPTER].weight.shape == (320, 384)
