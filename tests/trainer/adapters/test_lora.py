"""The functions of LoRA and DoRA layers against the same formulas left to autograd, in fp64."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._dynamo.utils import counters

from trainer.adapters.build import prepare_layers
from trainer.adapters.dora import DoraMagnitude
from trainer.model.quantize import WeightOnlyLinear

NAME, RANK, SCALING = "default", 4, 3.0
BASES = ("fp32", "bf16", "int8", "fp8")


def adapted_layer(base: str, *, dora: bool, bias: bool = True, times: float = 1.0) -> nn.Module:
    """A layer of 48 inputs and 40 outputs with an adapter whose tensors all have values.  times: its weight."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 40, bias=bias).requires_grad_(False)
    linear.weight *= times
    if base != "fp32":
        linear = linear.to(torch.bfloat16)
    if base in ("int8", "fp8"):
        linear = WeightOnlyLinear(linear.weight.detach(), linear.bias if bias else None, base)
    model = nn.ModuleDict({"layer": linear})
    settings = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["layer"])
    layer = inject_adapter_in_model(settings, model, adapter_name=NAME)["layer"]
    for part in (layer.lora_A, layer.lora_B):
        part[NAME].weight.data = torch.randn(part[NAME].weight.shape) / 8
    if dora:
        layer.lora_magnitude_vector[NAME] = DoraMagnitude()
        layer.lora_magnitude_vector[NAME].weight = nn.Parameter(0.5 + torch.rand(40))
    prepare_layers(model, NAME)
    return layer


def formula(layer: nn.Module, x: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    """What the layer stands for.  tensors: A, B and, of a DoRA, the magnitudes, in fp64."""
    a, b, *magnitude = tensors
    base = layer.get_base_layer()
    weight = (base.dequantized() if isinstance(base, WeightOnlyLinear) else base.weight).double()
    changed = weight + SCALING * b @ a
    if magnitude:
        changed = changed * (magnitude[0] / changed.detach().norm(dim=1)).unsqueeze(1)
    return nn.functional.linear(x, changed, None if base.bias is None else base.bias.double())


def trained(layer: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_those_of_the_formula(base, dora, bias):
    layer = adapted_layer(base, dora=dora, bias=bias)
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    x = torch.randn(2, 7, 48, dtype=dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    exact = [parameter.detach().double().requires_grad_() for parameter in trained(layer)]
    given, expected = layer(x), formula(layer, exact_x, exact)
    assert given.dtype == dtype
    direction = torch.randn(given.shape, dtype=dtype)
    given.backward(direction)
    expected.backward(direction.double())
    tolerance = 1e-5 if base == "fp32" else 0.02
    pairs = [(given, expected), (x.grad, exact_x.grad)]
    pairs += [(p.grad, e.grad) for p, e in zip(trained(layer), exact, strict=True)]
    for one, other in pairs:
        assert (one.double() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["bf16", "int8", "fp8"])
def test_nothing_of_the_base_and_one_output_at_most_is_kept_beside_the_input(base, dora):
    layer = adapted_layer(base, dora=dora)
    kept = {}
    x = torch.randn(64, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = layer(x)
    stored = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers(), x, out)}
    assert max(t.numel() for t in kept.values() if t.data_ptr() not in stored) <= 64 * RANK
    assert dora or out.data_ptr() not in kept


@pytest.mark.parametrize("base", ["int8", "fp8"])
def test_a_compiler_makes_one_graph_for_layers_of_other_scales(base):
    layers = [adapted_layer(base, dora=False), adapted_layer(base, dora=False, times=3.0)]
    graphs = []
    for layer in layers:
        x = torch.randn(7, 48, dtype=torch.bfloat16, requires_grad=True)
        compiled = torch.compile(layer.forward, backend="aot_eager", dynamic=True, fullgraph=True)
        given, expected = compiled(x), layer(x)
        assert (given - expected).norm() < 0.01 * expected.norm()
        given.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize("more", [{"lora_bias": True}, {"lora_dropout": 1.0}], ids=["bias", "dropout"])
def test_an_adapter_with_a_bias_or_a_dropout_computes_as_peft_has_it(more):
    """As a file of another trainer, which is only evaluated here, may have one."""
    layer = adapted_layer("fp32", dora=False)
    layer.update_layer("other", RANK, RANK, LoraConfig(r=RANK, **more))
    layer.lora_B["other"].weight.data.normal_()
    if layer.lora_B["other"].bias is not None:
        layer.lora_B["other"].bias.data.normal_()
    layer.set_adapter("other")
    x = torch.randn(3, 48)
    adapted = 0 * x if "lora_dropout" in more else x
    expected = layer.get_base_layer()(x) + layer.lora_B["other"](layer.lora_A["other"](adapted))
    torch.testing.assert_close(layer(x), expected)


def test_with_no_adapter_on_the_base_computes():
    layer = adapted_layer("fp32", dora=False)
    layer.set_adapter([])
    x = torch.randn(3, 48)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_with_two_adapters_on_peft_computes():
    layer = adapted_layer("fp32", dora=False)
    x = torch.randn(3, 48)
    one = layer(x)
    layer.update_layer("second", RANK, RANK, LoraConfig(r=RANK))
    layer.lora_B["second"].weight.data.normal_()
    layer.set_adapter([NAME, "second"])
    second = layer.lora_B["second"].weight @ layer.lora_A["second"].weight
    torch.testing.assert_close(layer(x), one + x @ second.t())
