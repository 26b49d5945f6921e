"""Compiled blocks under engines that shard, and from start to end: a run is that of plain ones."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.trainer.engines.runs import SINGLE, furthest, go_on_from, read_metrics, read_tensors, train
from tests.trainer.engines.test_adapter_runs import FLOW
from tests.trainer.engines.test_guarded_runs import read_events, train_on_bad_rows

LAST_STEP = 1  # the next one may be of another size, for which tiny pictures have another graph
SHORT = (f"train.steps={LAST_STEP}", "train.warmup_steps=0", f"checkpoint.every_steps={LAST_STEP}")
TWO_MICRO_STEPS = ("train.global_batch_size=8", "train.micro_batch_size=2")
COMPILED = "train.compile=regional"
FEW = "rank: 8, alpha: 16, targets: [to_q, proj_mlp]"  # each adapted layer takes its time to trace
METHODS = {"lora": f"method={{type: lora, {FEW}}}", "dora": f"method={{type: dora, {FEW}}}"}
# Of a double block and a single one. Of an adapter two for the passes that compute the base alone, too, and one for the
# first double block, whose inputs have no gradients.
GRAPHS_OF_FULL, GRAPHS_OF_ADAPTER = 2, 5

pytestmark = pytest.mark.slow


def train_compiled(arguments: list[str], trains: Callable = train, backend: str = "aot_eager") -> int:
    """The trainer, in a rank: how many graphs were made. None is made too often.

    They run as they were traced: inductor would write kernels of a CPU for minutes, and what is gathered, saved and
    computed again is the same without.
    """
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend=backend)
    trains(arguments)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "engine, num_processes, method, precision, checkpointed, backend",
    [
        ("fsdp2", 2, "full", "fp32", "true", "aot_eager"),
        ("fsdp2", 2, "dora", "fp32", "3", "aot_eager"),
        ("fsdp2-offload", 2, "lora", "int8", "auto", "eager"),
        ("hsdp", 4, "lora", "fp32", "true", "eager"),
    ],
)
def test_compiled_blocks_train_what_plain_ones_train(
    launch, engine, num_processes, method, precision, checkpointed, backend
):
    adapter = (METHODS[method], *FLOW) if method in METHODS else ()
    settings = (*SHORT, *TWO_MICRO_STEPS, *adapter, f"model.precision={precision}")
    name = f"compiled-{engine}-{method}"
    given = (*settings, COMPILED, f"train.activation_checkpointing={checkpointed}")
    run = launch(engine, num_processes, name, *given, function=partial(train_compiled, backend=backend))
    plain = launch(*SINGLE, f"plain-of-{name}", *settings).folder
    within = 1e-4 if precision == "fp32" else 1e-2  # products in bf16, and sums in another order
    for figure in ("loss", "grad_norm"):
        figures = [[line[figure] for line in read_metrics(folder)] for folder in (run.folder, plain)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-4, rel=within) and len(figures[0]) == LAST_STEP
    if precision == "fp32":
        assert furthest(read_tensors(run.folder, LAST_STEP), read_tensors(plain, LAST_STEP)) < 1e-4
    assert set(run.returned) == {GRAPHS_OF_ADAPTER if adapter else GRAPHS_OF_FULL}


def test_a_compiled_run_goes_back_past_a_bad_batch_and_on_from_a_checkpoint_as_a_plain_one(launch):
    """Its average, too, is that of the plain run."""
    half, last = 2, 4
    settings = (f"train.steps={last}", "train.warmup_steps=0", f"checkpoint.every_steps={half}")
    settings += ("guard.max_skips=1", "guard.lr_factor=1.0", METHODS["lora"], *FLOW)
    trains = partial(train_on_bad_rows, batches=(half,))
    plain = launch(*SINGLE, "plain-goes-back", *settings, function=trains).folder
    trains = partial(train_compiled, trains=trains, backend="eager")
    whole = launch(*SINGLE, "compiled-goes-back", *settings, COMPILED, function=trains)
    halves = go_on_from(whole.folder, "compiled-goes-on", half)
    resumed = launch(*SINGLE, halves.name, *settings, COMPILED, function=trains)
    for run in (whole, resumed):
        losses = [[line["loss"] for line in read_metrics(folder)] for folder in (run.folder, plain)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == last
        assert furthest(read_tensors(run.folder, last), read_tensors(plain, last)) < 1e-4
        assert [event["event"] for event in read_events(run.folder)].count("rollback") == 1
        assert run.returned[0] <= 2 * GRAPHS_OF_ADAPTER  # micro-batches of one sample have their own
