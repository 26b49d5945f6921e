import logging
from dataclasses import replace

import pytest
import torch

from configs.errors import InputError
from data.batches.row_filler import ReplacedRow
from trainer.checkpoints.folders import save_checkpoint
from trainer.checkpoints.resume import choose_checkpoint, load_tensors, resume
from trainer.checkpoints.run_state import RunState, write_state
from trainer.checkpoints.save import describe_engine, snapshot
from trainer.checkpoints.tensor_files import rank_file, write_index, write_tensors
from trainer.engines.ema import Ema
from trainer.engines.ranks import Ranks
from trainer.optimizers.state import dequantize, quantize
from trainer.training_data import choose_order

REPLACED = tuple(
    ReplacedRow(position, "shards/a.tar", row, row + 1) for position, row in ((3, 0), (5, 1), (8, 0), (9, 4))
)


@pytest.fixture
def saved(config, samples, engine, tmp_path):
    """Makes a checkpoint of a run in the given order: (config of the run, its checkpoint's folder)."""

    def save(order, replaced=()):
        run = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "kept"})})
        state = RunState(step=3, batch=3, skips=0, restarts=0, order=order, replaced=replaced)

        def write(folder):
            write_state(folder, state, {"name": engine.name})
            return {}

        return run, save_checkpoint(run.run.folder, 3, write)

    return save


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"seed": 9}, r"run\.seed is 42, the run has 9"),
        ({"global_batch_size": 5}, r"train\.global_batch_size is \d+, the run has 5"),
        ({"weights": {"photographs": 2.0}}, r"weight of data\.datasets is .*1\.0.*, the run has .*2\.0\}"),
        ({"shards": "0" * 32}, r"data\.cache holds other training samples than when the run began"),
    ],
)
def test_another_order_of_the_samples_is_refused(config, samples, engine, saved, change, problem):
    run, folder = saved(replace(choose_order(config, samples), **change))
    with pytest.raises(InputError, match=rf"{folder}: another order of the samples:\n  {problem}\nSet them back"):
        resume(run, "auto", engine, Ema([], None), choose_order(config, samples))


def test_ranks_that_see_different_caches_are_refused(config, samples, engine, monkeypatch):
    order = choose_order(config, samples)
    orders = [order, order, replace(order, shards="0" * 32), order]
    monkeypatch.setattr(Ranks, "all_gather", lambda self, own: orders)
    with pytest.raises(InputError, match=r"rank 2 sees another data\.cache than rank 0 .*0{32}"):
        resume(config, "never", engine, Ema([], None), order)


def test_a_run_keeps_its_streams_and_blocks(config, samples, engine, saved, monkeypatch):
    """Chosen for the machines it began on; the samples' order outlives them."""
    monkeypatch.setattr("trainer.checkpoints.resume.load_tensors", lambda *_, **__: None)
    before = replace(choose_order(config, samples), streams=2, block_shards=3)
    run, _ = saved(before, replaced=REPLACED[:2])
    state = resume(run, "auto", engine, Ema([], None), choose_order(config, samples))
    assert state.order == before
    assert state.replaced == REPLACED[:2]
    assert (state.step, state.restarts) == (3, 1)


# --- the choice of a checkpoint ---------------------------------------------------------------------------------------


def test_a_machine_that_sees_another_folder_does_not_send_the_run_back(config, samples, engine, saved, monkeypatch):
    """Its half of the files is missing there, and whole where rank 0 looks."""
    run, folder = saved(choose_order(config, samples))
    monkeypatch.setattr(Ranks, "all_gather", lambda self, item: [item, "rank-00001.safetensors is missing"])
    monkeypatch.setattr(engine, "world_size", 2)
    with pytest.raises(
        InputError, match=rf"{folder}: rank 1 finds that rank-00001.* is missing, rank 0 finds it intact"
    ):
        choose_checkpoint(run, "auto", engine)


# --- 8-bit state ------------------------------------------------------------------------------------------------------


def test_8_bit_state_of_another_layout_is_quantized_again_and_the_log_says_so(engine, tmp_path, caplog, monkeypatch):
    from bitsandbytes.optim import AdamW8bit

    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    model = torch.nn.Linear(64, 128, bias=False)
    model.device = torch.device("cpu")
    engine.prepare(model, AdamW8bit)
    engine.init_optimizer_state()
    ((_, _, state),) = engine.optimizer_states()
    codes, scales = quantize(torch.randn(8192), "state1")
    state["state1"].copy_(codes.view(128, 64)), state["absmax1"].copy_(scales)
    tensors, spans = snapshot(engine, Ema([], None), copy=True)
    write_tensors(tmp_path / rank_file(0), tensors)
    write_index(tmp_path, {0: spans}, engine.trained_sizes)
    state["state1"].zero_(), state["absmax1"].zero_()

    load_tensors(tmp_path, engine, Ema([], None), describe_engine(engine) | {"layout": "slices of fsdp2 on 3"})
    assert "8-bit optimizer state saved as slices of fsdp2 on 3 was quantized again" in caplog.text
    found = dequantize(state["state1"], state["absmax1"], "state1").view(-1)
    torch.testing.assert_close(found, dequantize(codes, scales, "state1"), rtol=0, atol=scales.max().item() / 70)
