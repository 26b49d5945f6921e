import json
from dataclasses import asdict, replace

import pytest

from configs.errors import InputError
from trainer.batches import choose_order
from trainer.checkpoint import save_checkpoint
from trainer.ema import Ema
from trainer.run_state import RunState, resume


@pytest.fixture
def saved(config, cache, engine, tmp_path):
    """Makes a checkpoint of a run in the given order: (config of the run, its checkpoint's folder)."""

    def save(order):
        run = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "kept"})})
        state = RunState(step=3, batch=3, skips=0, restarts=0, order=order)

        def write(folder):
            text = json.dumps({"state": asdict(state), "engine": {"name": engine.name}})
            (folder / "state.json").write_text(text)
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
def test_another_order_of_the_samples_is_refused(config, cache, engine, saved, change, problem):
    run, folder = saved(replace(choose_order(config, cache), **change))
    with pytest.raises(InputError, match=rf"{folder}: another order of the samples:\n  {problem}\nSet them back"):
        resume(run, "auto", engine, Ema([], None), choose_order(config, cache))


def test_a_run_keeps_its_streams_and_blocks(config, cache, engine, saved, monkeypatch):
    """Chosen for the machines it began on; the samples' order outlives them."""
    monkeypatch.setattr("trainer.run_state.load_tensors", lambda *_: None)
    before = replace(choose_order(config, cache), streams=2, block_shards=3)
    run, _ = saved(before)
    state = resume(run, "auto", engine, Ema([], None), choose_order(config, cache))
    assert state.order == before
    assert (state.step, state.restarts) == (3, 1)
