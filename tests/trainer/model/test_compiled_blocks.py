"""Compiled blocks of one process; whole runs with them are those of tests/trainer/engines/test_compiled_runs.py."""

import logging
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.errors import InputError
from configs.schema import DoraConfig, FlowConfig, LokrConfig
from data.samples.geometry import Bucket
from tests.trainer.adapters.live_models import DORA, adapted, lora, train_a_little
from trainer.adapters.build import add_adapter
from trainer.adapters.dora import DoraMagnitude, take_norms_before_graphs
from trainer.adapters.lora import patch_lora_forward
from trainer.model.checkpointing import checkpoint_blocks
from trainer.model.compiled_blocks import GRAPHS, _call, _call_single, compile_blocks
from trainer.model.compute_dtype import compute_in
from trainer.model.flow import flow_loss, velocity_target
from trainer.model.flux import load_transformer, predict_velocity
from trainer.model.quantize import quantize_base
from trainer.process.out_of_memory import is_out_of_memory

FLOW = FlowConfig(keep_target="base")
FEW = ["to_q", "proj_mlp"]  # each adapted layer takes its time to trace
LORA_ON_FEW = lora(targets=FEW)
DORA_ON_FEW = DoraConfig(type="dora", rank=4, alpha=8, targets=FEW)
LOKR_ON_FEW = LokrConfig(type="lokr", rank=2, alpha=6, factor=4, targets=FEW)


@pytest.fixture(autouse=True)
def no_graphs():
    """None of another test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("default"):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# --- what a block is handed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [lambda x: x[:, 1:3], lambda x: x.view_as(x), lambda x: x])
def test_a_block_meets_no_views_and_its_gradients_go_through(cut):
    """When a block is computed again its inputs are views no more, and a graph that was made of views would not do."""
    met = []

    def forward(*inputs, scale):
        met.extend(inputs)
        return scale * sum(x.sum() for x in inputs)

    leaves = [torch.randn(2, 5, requires_grad=True) for _ in range(3)]
    given = [cut(2 * leaf) for leaf in leaves]
    _call(forward, *given, scale=3).backward()
    assert all(x._base is None and x.data_ptr() == of.data_ptr() for x, of in zip(met, given, strict=True))
    assert all(leaf.grad.sum() == 6 * x.numel() for leaf, x in zip(leaves, given, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_first_single_block_is_handed_what_the_others_are(batch):
    """Slices of one tensor: by other strides each kind of pass would have one graph more."""
    met = []

    def forward(hidden_states, encoder_hidden_states, temb):
        met.append((hidden_states, encoder_hidden_states))
        return torch.cat([encoder_hidden_states, hidden_states], dim=1).split([3, 5], dim=1)

    text, picture = torch.randn(batch, 3, 4), torch.randn(batch, 5, 4)
    after = _call_single(forward, picture, text, torch.randn(batch, 4))
    _call_single(forward, after[1], after[0], torch.randn(batch, 4))
    for first, second in zip(*met, strict=True):
        assert torch.equal(first, second) and first.stride() == second.stride()
        assert first.storage_offset() == second.storage_offset()
    assert met[1][0].data_ptr() == after[1].data_ptr()  # and those are not copied once more


# --- what cannot be compiled ------------------------------------------------------------------------------------------


def inputs(batch: int) -> list[torch.Tensor]:
    return [torch.ones(batch, 3), torch.ones(batch, 3), torch.ones(batch, 3)]


def compiled(function, **settings):
    return torch.compile(function, dynamic=True, fullgraph=True, **({"backend": "eager"} | settings))


def test_a_graph_too_many_is_told_and_done_without(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    forward = compiled(lambda x, y, z: x + 2 * y + z)
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (2, 1, 3, 1):  # one sample alone has a graph of its own
            assert torch.equal(_call(forward, *inputs(batch)), torch.full((batch, 3), 4.0))
    assert graphs() == 1
    told = [record.message for record in caplog.records if record.name == "fluxfill"]
    assert len(told) == 1 and "has its 1 graphs" in told[0]


def test_a_block_that_is_no_whole_graph_is_refused():
    def breaks(x, y, z):
        torch._dynamo.graph_break()
        return x + y + z

    with pytest.raises(InputError, match=r"train\.compile regional: no graph can be made .*\. Set train\.compile=off"):
        _call(compiled(breaks), *inputs(2))


@pytest.mark.parametrize("when", ["while a graph is made", "while it runs"])
def test_no_memory_for_a_block_is_known_as_such(when):
    def backend(*_):
        def run(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        return run() if when == "while a graph is made" else run

    with pytest.raises(RuntimeError) as raised:
        _call(compiled(lambda x, y, z: x + y + z, backend=backend), *inputs(2))
    assert is_out_of_memory(raised.value)


# --- settings of torch's compiler -------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A block of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.kind = layer, 0  # a graph for each kind

    def forward(self, hidden_states, encoder_hidden_states, temb):
        return self.layer(hidden_states.sin()) + self.kind


def compile_layer(layer: nn.Module, monkeypatch, backend) -> OneLayer:
    """By `compile_blocks`, as a double block."""
    block = OneLayer(layer)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compile_blocks(SimpleNamespace(transformer_blocks=[block], single_transformer_blocks=[]))
    return block


def frozen() -> nn.Linear:
    return nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False)


def quantized(precision: str) -> nn.Module:
    transformer = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.ModuleDict({"to_q": frozen()})])})
    quantize_base(transformer, precision, lambda tensor: tensor.detach())
    return transformer["transformer_blocks"][0]["to_q"]


def with_lora(layer: nn.Module) -> nn.Module:
    adapted = get_peft_model(nn.ModuleDict({"to_q": layer}), LoraConfig(r=2, target_modules=["to_q"]))
    patch_lora_forward(adapted)
    return adapted.base_model.model["to_q"]


def of_masters() -> nn.Module:
    layers = nn.ModuleDict({"to_q": nn.Linear(24, 40)})
    compute_in(layers, torch.bfloat16)
    return layers["to_q"]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: quantized("int8"),
        lambda: quantized("fp8"),
        lambda: with_lora(quantized("int8")),
        lambda: with_lora(quantized("fp8")),
        lambda: with_lora(frozen()),
        of_masters,
    ],
    ids=["int8", "fp8", "lora-int8", "lora-fp8", "lora-bf16", "fp32-masters"],
)
def test_a_graph_keeps_a_weight_for_its_backward_pass_where_it_lies(layer, monkeypatch):
    """As without a graph; by torch's own setting of the partitioner it keeps a copy in bf16 of each weight."""
    block = compile_layer(layer(), monkeypatch, "aot_eager_decomp_partition")
    weight = next(parameter for parameter in block.parameters() if parameter.shape == (40, 24))
    for forward in (partial(OneLayer.forward, block), block):
        saved: list[torch.Tensor] = []
        inputs = [torch.randn(2, size, 24, dtype=torch.bfloat16, requires_grad=True) for size in (3, 5, 1)]
        with torch.autograd.graph.saved_tensors_hooks(partial(_kept, saved), lambda x: x):
            out = forward(*inputs)
        kept = [(x.data_ptr(), x.element_size()) for x in saved if x.numel() == weight.numel()]
        assert kept == [(weight.data_ptr(), weight.element_size())]
        out.sum().backward()
        assert inputs[0].grad is not None and inputs[0].grad.abs().sum() > 0
    assert graphs() == 1


def _kept(saved: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    saved.append(x)
    return x


def test_blocks_computed_again_in_another_thread_have_the_same_settings(caplog, monkeypatch):
    """As on a GPU, whose backward pass runs in a thread of autograd's; torch keeps settings thread by thread."""
    from torch._functorch import config as partitioner
    from torch.fx.experimental import _config as sizes

    met = []

    def backend(graph, _):
        dynamo = torch._dynamo.config
        settings = dynamo.recompile_limit, dynamo.optimize_ddp, sizes.use_duck_shape
        met.append((threading.get_ident(), *settings, partitioner.ban_recompute_materialized_backward))
        return graph.forward

    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    block = compile_layer(nn.Linear(3, 3), monkeypatch, backend)
    for block.kind in range(10):  # more than torch's own limit, 8
        inputs = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
        out = checkpoint(block, *inputs, use_reentrant=False)
    block.kind = 10
    thread = threading.Thread(target=out.sum().backward)
    thread.start()
    thread.join()
    assert inputs[0].grad is not None
    assert not any(record.name == "fluxfill" for record in caplog.records)
    assert met == [(threading.get_ident(), GRAPHS, False, False, False)] * 10 + [
        (thread.ident, GRAPHS, False, False, False)
    ]


# --- the passes of a run ----------------------------------------------------------------------------------------------


def of_size(rows, batch: int, width: int):
    """The micro-batch of one row, as `batch` alike, `width` px wide instead of 64."""
    repeated = {
        name: torch.cat([value] * batch) for name, value in vars(rows).items() if isinstance(value, torch.Tensor)
    }
    for name in ("latents", "masked_latents", "noise", "mask"):
        repeated[name] = repeated[name].repeat_interleave(2, dim=-1)[..., : repeated[name].shape[-1] * width // 64]
    return replace(rows, bucket=Bucket(64, width), **repeated)


def train_on(transformer, rows) -> tuple[float, float]:
    """The loss of a micro-step, and the norm of its gradient."""
    sigma = torch.full((len(rows.noise),), 0.5)
    target = velocity_target(transformer, rows.noise, rows, sigma, FLOW)
    velocity = predict_velocity(transformer, rows.noise, rows, sigma, FLOW)
    loss = flow_loss(velocity, target, torch.ones_like(rows.noise[:, :1])).mean()
    transformer.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in transformer.parameters() if parameter.requires_grad]
    return loss.item(), torch.nn.utils.get_total_norm(gradients).item()


@torch.no_grad()
def validate(transformer, rows) -> tuple[float, ...]:
    transformer.eval()
    velocity = predict_velocity(transformer, rows.noise, rows, torch.full((len(rows.noise),), 0.5), FLOW)
    transformer.train()
    return (velocity.float().norm().item(),)


def prepare(model, method, precision: str | None, *, compiles: bool):
    """A transformer as `build_transformer` makes it, with an adapter that was trained a little."""
    if precision is None:
        transformer = adapted(model, method)
    else:
        transformer = load_transformer(model, dtype=torch.bfloat16)
        quantize_base(transformer, precision, lambda tensor: tensor.detach())
        add_adapter(transformer, method, expanded=False, seed=0)
        compute_in(transformer, torch.bfloat16)
    train_a_little(transformer)
    if compiles:
        take_norms_before_graphs(transformer)
        compile_blocks(transformer)
    checkpoint_blocks(transformer, 3)
    return transformer.train()


ONE_STEP = ((train_on, 2, 64), (train_on, 3, 96))
A_RUN = (*ONE_STEP, (validate, 2, 64), (train_on, 1, 64), (validate, 1, 96), (train_on, 4, 128), (validate, 5, 32))
# Of double blocks, the first of which has inputs without gradients, and of single ones.
WITHOUT_ADAPTER, WITH_ADAPTER, SAMPLING = 1 + 1, 2 + 1, 1 + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, precision, passes, expected",
    [
        (LORA_ON_FEW, None, A_RUN, 2 * (WITHOUT_ADAPTER + WITH_ADAPTER + SAMPLING)),  # once more for one sample alone
        (DORA_ON_FEW, "int8", ONE_STEP, WITHOUT_ADAPTER + WITH_ADAPTER),
        (DORA_ON_FEW, "nf4", ONE_STEP, WITHOUT_ADAPTER + WITH_ADAPTER),
        (LOKR_ON_FEW, "fp8", ONE_STEP, WITHOUT_ADAPTER + WITH_ADAPTER),
    ],
    ids=["lora-of-a-run", "dora-int8", "dora-nf4", "lokr-fp8"],
)
def test_each_kind_of_pass_has_one_graph_which_computes_the_same(
    tiny_model, rows, method, precision, passes, expected, monkeypatch
):
    """Whatever the size, with some blocks checkpointed. Each graph must be whole."""
    plain = prepare(tiny_model, method, precision, compiles=False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    transformer = prepare(tiny_model, method, precision, compiles=True)
    for call, batch, width in passes:
        given = of_size(rows, batch, width)
        tolerance = 1e-4 if precision is None else 1e-2
        assert call(transformer, given) == pytest.approx(call(plain, given), rel=tolerance), (call, batch, width)
    assert graphs() == expected < GRAPHS


def test_norms_of_a_base_are_there_before_a_block_is_called_and_taken_once(tiny_model, rows):
    """Within a graph they would be taken in its first call, and another graph be made for the second."""
    transformer = adapted(tiny_model, DORA)
    take_norms_before_graphs(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    met = []
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, DoraMagnitude)]
        block.forward = partial(_noting, met, layers, block.forward)
    for _ in range(2):
        with torch.no_grad():
            predict_velocity(transformer, rows.noise, rows, torch.tensor([0.5]), FLOW)
    assert len(met) == 2 * len(blocks) and all(norms is not None for layers in met for norms in layers)
    assert all(a is b for one, two in zip(met, met[len(blocks) :], strict=False) for a, b in zip(one, two, strict=True))
    assert not any(block._forward_pre_hooks for block in blocks)


def _noting(met, layers, forward, *inputs, **named):
    met.append([layer._base_norms for layer in layers])
    return forward(*inputs, **named)
