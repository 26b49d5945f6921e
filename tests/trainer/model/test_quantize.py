"""Quantized bases: their layers compute what the weights say, on every engine that takes them."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks

PRECISIONS = ("nf4", "int8", "fp8")
# Of a normal weight: relative errors of 4 bits with a scale per 64, 8 bits with one per row, and a 3-bit mantissa.
WEIGHT_ERRORS = {"nf4": 0.11, "int8": 0.012, "fp8": 0.04}


class Blocks(nn.Module):
    """Two linear layers at names that get quantized, and one outside the blocks that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"ff": nn.Linear(128, 192)})])
        self.single_transformer_blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(192, 64, bias=False)})])
        self.proj_out = nn.Linear(64, 16)
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.single_transformer_blocks[0]["proj"](self.transformer_blocks[0]["ff"](x)))


def quantized(precision: str) -> tuple[Blocks, Blocks]:
    from trainer.model.quantize import quantize_base

    whole = Blocks()
    model = copy.deepcopy(whole)
    quantize_base(model, precision, lambda tensor: tensor.detach().clone())
    return whole, model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantized_layers_are_of_one_class(precision):
    """A compiled graph is of classes: with a class for each layer each block would have graphs of its own."""
    _, model = quantized(precision)
    layers = model.transformer_blocks[0]["ff"], model.single_transformer_blocks[0]["proj"]
    assert type(layers[0]) is type(layers[1]) is not nn.Linear


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_linear_layers_of_the_blocks_are_quantized_and_no_others(precision):
    from trainer.model.quantize import dequantized_linear, is_quantized

    whole, model = quantized(precision)
    assert [name for name, module in model.named_modules() if is_quantized(module)] == [
        "transformer_blocks.0.ff",
        "single_transformer_blocks.0.proj",
    ]
    assert type(model.proj_out) is nn.Linear and torch.equal(model.proj_out.weight, whole.proj_out.weight)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before, after = whole.transformer_blocks[0]["ff"], model.transformer_blocks[0]["ff"]
    bits = after.weight.numel() * after.weight.element_size() * 8 / before.weight.numel()
    assert bits == (4 if precision == "nf4" else 8)
    restored = dequantized_linear(after).weight
    error = ((restored - before.weight).float().norm() / before.weight.float().norm()).item()
    assert 0 < error < WEIGHT_ERRORS[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_output_and_gradient_are_those_of_the_dequantized_weights(precision):
    from trainer.model.quantize import dequantized_linear, is_quantized

    _, model = quantized(precision)
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if is_quantized(layer):
            twin.set_submodule(name, dequantized_linear(layer))
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layers(given) for layers, given in zip((model, twin), inputs, strict=True)]
    for output in outputs:
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    assert (outputs[0] - outputs[1]).norm() < 0.01 * outputs[1].norm()
    assert (inputs[0].grad - inputs[1].grad).norm() < 0.01 * inputs[1].grad.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_whole_weight_is_kept_for_the_backward_pass(precision):
    _, model = quantized(precision)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True))
    blocks = [*model.transformer_blocks.parameters(), *model.single_transformer_blocks.parameters()]
    stored = {parameter.data_ptr() for parameter in blocks}
    assert not [t.shape for t in kept if t.numel() >= 64 * 192 and t.is_floating_point() and t.data_ptr() not in stored]


def errors_of_fp8(weight: torch.Tensor) -> tuple[float, float]:
    """Relative errors of a product with an fp8 weight: with one scale, and with a scale per output row."""
    from torchao.quantization import Float8Tensor, PerRow

    from trainer.model.quantize import WeightOnlyLinear

    by_rows = Float8Tensor.from_hp(weight, granularity=PerRow())
    x = torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(1))
    exact = x @ weight.float().t()
    restored = (WeightOnlyLinear(weight, None, "fp8").dequantized(), by_rows.qdata.float() * by_rows.scale)
    of_one, of_rows = (((x @ matrix.t() - exact).norm() / exact.norm()).item() for matrix in restored)
    return of_one, of_rows


# How a weight is made of normal numbers.
WEIGHTS = {
    "normal": lambda normal: normal,
    "rows up to 2^6 apart": lambda normal: normal * 2 ** (6 * torch.rand(512, 1)),
    "rows up to 2^12 apart": lambda normal: normal * 2 ** (12 * torch.rand(512, 1)),
    "one row of 2^12": lambda normal: normal * torch.cat([torch.tensor([[2.0**12]]), torch.ones(511, 1)]),
    "columns up to 2^6 apart": lambda normal: normal * 2 ** (6 * torch.rand(1, 512)),
    "few large ones": lambda normal: normal / torch.randn(3, 512, 512).norm(dim=0),  # Student's t of 3
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_one_scale_makes_fp8_as_exact_as_a_scale_per_row(kind):
    torch.manual_seed(0)
    of_one, of_rows = errors_of_fp8((0.02 * WEIGHTS[kind](torch.randn(512, 512))).bfloat16())
    # The largest of each row has no error if the scale is the row's: much of a row where few numbers are most of it.
    assert 0 < of_one < (1.2 if kind == "few large ones" else 1.1) * of_rows


def test_one_scale_makes_fp8_as_exact_as_a_scale_per_row_on_every_weight_of_the_tiny_model(tiny_model):
    from trainer.model.flux import load_transformer
    from trainer.model.quantize import quantizable_layers

    layers = list(quantizable_layers(load_transformer(tiny_model, dtype=torch.bfloat16)))
    assert len(layers) > 10
    for name, layer in layers:
        of_one, of_rows = errors_of_fp8(layer.weight.detach())
        assert 0 < of_one < 1.1 * of_rows, name


def test_a_product_of_fp8_numbers_is_scaled_before_it_is_rounded_to_bf16():
    from trainer.model.quantize import WeightOnlyLinear

    torch.manual_seed(0)
    layer = WeightOnlyLinear(0.02 * torch.randn(192, 128).bfloat16(), torch.randn(192).bfloat16(), "fp8")
    x, gradient = torch.randn(5, 128).bfloat16().requires_grad_(), torch.randn(5, 192).bfloat16()
    out = layer(x)
    out.backward(gradient)
    exact = torch.nn.functional.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    for given, expected in ((out, exact), (x.grad, gradient.double() @ layer.dequantized().double())):
        # But for numbers that lie between two of bf16's, whose sum in fp32 may be on the other side.
        assert (given == expected.bfloat16()).double().mean() > 0.99


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_cast_of_the_model_leaves_quantized_weights_as_they_are(precision):
    _, model = quantized(precision)
    layer = model.transformer_blocks[0]["ff"]
    before = layer.dequantized()
    assert torch.equal(model.bfloat16().transformer_blocks[0]["ff"].dequantized(), before)


LORA = "method={type: lora, rank: 8, alpha: 16}"
STEPS, HALF = 4, 2


def train(arguments: list[str]) -> int:
    from trainer.main import train

    return train(arguments)


@pytest.fixture(scope="module")
def launch(config, tmp_path_factory):
    """Runs the trainer: `launch(engine, processes, name, "key=value", ...)`; returns the run's folder, or, given a
    function to run in its place, what it returned in each rank."""
    from configs.loading import dump_config

    runs = tmp_path_factory.mktemp("quantized")
    path = runs / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")

    def run(engine: str, num_processes: int, name: str, *overrides: str, function=None):
        settings = {
            "run.dir": runs,
            "run.name": name,
            "train.global_batch_size": 4,
            "train.micro_batch_size": 2,
            "train.steps": STEPS,
            "train.warmup_steps": 1,
            "validation.every_steps": "null",
            "checkpoint.every_steps": HALF,
            "logging.trackers": "[]",
        }
        line = [f"{key}={value}" for key, value in settings.items()]
        arguments = ["--config", str(path), LORA, *line, *overrides]
        returned = run_ranks(engine, num_processes, function or train, arguments)
        return runs / name if function is None else returned

    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "final" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def alone(launch):
    """The folder of a run on one process, by precision; made once."""
    made: dict[str, Path] = {}

    def run(precision: str) -> Path:
        if precision not in made:
            made[precision] = launch("single", 1, f"{precision}-alone", f"model.precision={precision}")
        return made[precision]

    return run


SLOW = [("int8", "ddp"), ("fp8", "ddp"), ("int8", "fsdp2"), ("fp8", "fsdp2"), ("nf4", "zero2"), ("int8", "zero2")]


@pytest.mark.parametrize(
    "precision, engine",
    [("nf4", "ddp"), ("nf4", "fsdp2"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_lora_on_a_quantized_base_trains_as_on_one_process_and_resumes_exactly(launch, alone, precision, engine):
    name = f"{precision}-{engine}"
    whole = launch(engine, 2, name, f"model.precision={precision}")
    # bf16 arithmetic on the same micro-batches: only the order in which gradients are summed differs.
    assert losses(whole) == pytest.approx(losses(alone(precision)), rel=2e-3)
    one, other = adapter(whole), adapter(alone(precision))
    assert one.keys() == other.keys()
    distance = sum((one[n] - other[n]).norm() ** 2 for n in one) / sum(other[n].norm() ** 2 for n in one)
    assert distance.sqrt() < 0.02

    halves = whole.parent / f"{name}-halves"
    checkpoint = Path("checkpoints", f"step-{HALF:08d}")
    shutil.copytree(whole / checkpoint, halves / checkpoint)
    shutil.copy(whole / "metrics.jsonl", halves)
    launch(engine, 2, halves.name, f"model.precision={precision}")
    assert losses(halves) == losses(whole)
    assert all(torch.equal(tensor, one[name]) for name, tensor in adapter(halves).items())


def train_and_add_up_the_base(arguments: list[str]) -> dict[str, float]:
    """The trainer; the sum of the squares of each quantized layer's weights, as this rank multiplies with them."""
    import trainer.main
    from trainer.model.quantize import WeightOnlyLinear

    sums = {}

    def add_up(config, engine, model, ema):
        for name, layer in engine.unwrap().named_modules():
            if isinstance(layer, WeightOnlyLinear):
                sums[name] = layer.dequantized().double().square().sum().item()

    trainer.main.export_and_verify = add_up
    trainer.main.train(arguments)
    return sums


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero1", marks=pytest.mark.slow)])
def test_zero_trains_on_the_base_of_one_process_to_the_last_bit(launch, engine):
    """Some versions of DeepSpeed cast buffers, too: scales would lose 16 of their bits."""
    settings = ("model.precision=int8", "train.steps=1", "train.warmup_steps=0")
    (alone,) = launch("single", 1, "base-alone", *settings, function=train_and_add_up_the_base)
    of_ranks = launch(engine, 2, f"base-{engine}", *settings, function=train_and_add_up_the_base)
    assert len(alone) > 10
    assert of_ranks == [alone, alone]


METHODS = {
    "dora": "method={type: dora, rank: 8, alpha: 16}",
    "lokr": "method={type: lokr, rank: 2, alpha: 4, factor: 4}",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, precision", [("dora", "nf4"), ("dora", "int8"), ("dora", "fp8"), ("lokr", "nf4"), ("lokr", "fp8")]
)
def test_dora_and_lokr_start_at_a_quantized_base_and_train_alike_on_one_process_and_on_shards(
    launch, alone, method, precision
):
    """The run reads its own adapter back by diffusers at its end, on the quantized base."""
    runs = [
        launch(engine, count, f"{method}-{precision}-{engine}", METHODS[method], f"model.precision={precision}")
        for engine, count in (("single", 1), ("fsdp2", 2))
    ]
    assert losses(runs[0])[0] == losses(alone(precision))[0]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-3)
    one, other = adapter(runs[0]), adapter(runs[1])
    assert one.keys() == other.keys()
    assert all((one[name] - other[name]).norm() < 0.05 * max(one[name].norm(), 0.01) for name in one)


def train_with_codes_stored_as(dtype: torch.dtype, arguments: list[str]) -> int:
    """The trap: bitsandbytes' codes stored in a dtype other than the one that shards are gathered in."""
    import bitsandbytes
    from torch.distributed.fsdp import MixedPrecisionPolicy

    import trainer.engines.fsdp
    from trainer.main import train

    trainer.engines.fsdp.mixed_precision = lambda _: MixedPrecisionPolicy(param_dtype=torch.bfloat16)

    original = bitsandbytes.nn.Params4bit.__new__

    def stored(cls, *args, quant_storage=None, **kwargs):
        return original(cls, *args, quant_storage=dtype, **kwargs)

    bitsandbytes.nn.Params4bit.__new__ = stored
    return train(arguments)


def test_the_self_check_stops_a_run_whose_shards_were_cast_on_their_way(launch, monkeypatch):
    import functools

    import tests.trainer.model.test_quantize as this

    monkeypatch.setattr(this, "train", functools.partial(train_with_codes_stored_as, torch.float16))
    with pytest.raises(AssertionError, match="computes something else than its dequantized reference"):
        launch("fsdp2", 2, "trapped", "model.precision=nf4")
