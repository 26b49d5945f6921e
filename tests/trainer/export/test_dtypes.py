import pytest
import torch

from trainer.export.dtypes import is_same, stored_dtype, to_stored

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "name, shape, kept",
    [
        ("transformer_blocks.0.attn.to_q.weight", (8, 8), FP8),
        ("single_transformer_blocks.3.proj_mlp.weight", (8, 8), FP8),
        ("single_transformer_blocks.3.proj_mlp.bias", (8,), torch.bfloat16),
        ("transformer_blocks.0.attn.norm_q.weight", (8,), torch.bfloat16),
        ("x_embedder.weight", (8, 384), torch.bfloat16),
        ("norm_out.linear.weight", (8, 8), torch.bfloat16),
    ],
)
def test_fp8_is_for_the_matrices_of_the_blocks(name, shape, kept):
    assert stored_dtype(name, shape, FP8) == to_stored(name, torch.zeros(shape), FP8).dtype == kept
    assert stored_dtype(name, shape, torch.float32) == torch.float32


def test_a_weight_beyond_fp8s_range_is_its_largest():
    stored = to_stored("transformer_blocks.0.ff.net.2.weight", torch.tensor([[1e4, -1e4, 1.0]]), FP8)
    assert stored.float().tolist() == [[448.0, -448.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_sameness_is_of_every_bit(dtype):
    tensor = torch.tensor([[1.0, float("nan")], [0.0, 2.0]]).to(dtype)
    assert is_same(tensor, tensor.clone()) and is_same(tensor.t(), tensor.t().contiguous())
    other = tensor.clone()
    other.view(torch.uint8).reshape(-1)[-1] ^= 1
    assert not is_same(tensor, other)
    assert not is_same(tensor, tensor.reshape(4))
    assert not is_same(tensor, tensor.to(torch.float64))
