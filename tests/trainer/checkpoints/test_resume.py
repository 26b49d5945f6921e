import logging
from dataclasses import replace

import pytest
import torch

from configs.errors import InputError, StorageFailed
from configs.schema import TrainConfig
from data.batches.row_filler import ReplacedRow
from trainer.checkpoints.folders import save_checkpoint
from trainer.checkpoints.resume import choose_checkpoint, choose_rollback, find_start, load_tensors
from trainer.checkpoints.run_state import RunState, write_rollbacks, write_state
from trainer.checkpoints.save import describe_engine, snapshot
from trainer.checkpoints.tensor_files import rank_file, write_index, write_tensors
from trainer.engines.ema import Ema
from trainer.engines.ranks import Ranks
from trainer.optimizers.optimizer import build_optimizer
from trainer.optimizers.state import dequantize, quantize
from trainer.training_data import choose_order

PRODIGY = TrainConfig(steps=10, global_batch_size=1, optimizer="prodigy", lr=1, warmup_steps=0)
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
def test_another_order_of_the_samples_is_refused(config, samples, engine, tiny_model, saved, change, problem):
    run, folder = saved(replace(choose_order(config, samples), **change))
    with pytest.raises(InputError, match=rf"{folder}: another order of the samples:\n  {problem}\nSet them back"):
        find_start(run, "auto", engine, tiny_model, choose_order(config, samples))


def test_ranks_that_see_different_caches_are_refused(config, samples, engine, tiny_model, monkeypatch):
    order = choose_order(config, samples)
    orders = [order, order, replace(order, shards="0" * 32), order]
    monkeypatch.setattr(Ranks, "all_gather", lambda self, own: orders)
    with pytest.raises(InputError, match=r"rank 2 sees another data\.cache than rank 0 .*0{32}"):
        find_start(config, "never", engine, tiny_model, order)


def test_a_run_keeps_its_streams_and_blocks(config, samples, engine, tiny_model, saved):
    """Chosen for the machines it began on; the samples' order outlives them."""
    before = replace(choose_order(config, samples), streams=2, block_shards=3)
    run, _ = saved(before, replaced=REPLACED[:2])
    start = find_start(run, "auto", engine, tiny_model, choose_order(config, samples))
    state = start.state
    assert state.order == before
    assert state.replaced == REPLACED[:2]
    assert (state.step, state.restarts) == (3, 1)


# --- the choice of a checkpoint ---------------------------------------------------------------------------------------


def test_a_machine_that_sees_another_folder_does_not_send_the_run_back(config, samples, engine, saved, monkeypatch):
    """Its half of the files is missing there, and whole where rank 0 looks."""
    run, folder = saved(choose_order(config, samples))
    seen = iter([("rank-00001.safetensors is missing", None), None])
    monkeypatch.setattr(Ranks, "all_gather", lambda self, item: [item, next(seen)])
    monkeypatch.setattr(engine, "world_size", 2)
    with pytest.raises(
        InputError, match=rf"{folder}: rank 1 finds that rank-00001.* is missing, rank 0 finds it intact"
    ):
        choose_checkpoint(run, "auto", engine)


def test_storage_that_does_not_answer_one_rank_ends_all_and_damages_nothing(
    config, samples, engine, saved, monkeypatch
):
    run, _ = saved(choose_order(config, samples))
    monkeypatch.setattr(Ranks, "all_gather", lambda self, item: [item, (None, "a: failed 4 time(s).")])
    monkeypatch.setattr(engine, "world_size", 2)
    with pytest.raises(StorageFailed, match=r"a: failed 4 time\(s\)\."):
        choose_checkpoint(run, "auto", engine)


def test_only_damaged_checkpoints_are_no_fresh_start_unless_one_is_asked_for(config, samples, engine, saved, caplog):
    run, folder = saved(choose_order(config, samples))
    with pytest.raises(InputError, match="holds checkpoints already"):
        choose_checkpoint(run, "never", engine)
    (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"none of its 1 checkpoints is intact.*--resume never.*another run\.name"):
        choose_checkpoint(run, "auto", engine)
    assert choose_checkpoint(run, "never", engine) is None


def test_fewer_steps_than_the_run_has_are_refused(config, samples, engine, tiny_model, saved, caplog):
    run, folder = saved(choose_order(config, samples))
    train = run.train.model_copy(update={"steps": 2, "warmup_steps": 0})
    with pytest.raises(InputError, match=rf"train\.steps is 2, but {folder} has 3 steps\. Raise it"):
        find_start(run.model_copy(update={"train": train}), "auto", engine, tiny_model, choose_order(config, samples))
    assert "what has changed" not in caplog.text


@pytest.fixture
def run_of(config, samples, engine, tmp_path):
    """Makes the run that has saved these steps: `run_of({step: changes of its state})`, and tells its config."""

    def make(states):
        run = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "saved"})})
        order = choose_order(config, samples)
        for step, changes in states.items():
            state = RunState(step=step, batch=step, skips=0, restarts=0, order=order)
            state = replace(state, **changes)
            save_checkpoint(
                run.run.folder, step, lambda folder, state=state: write_state(folder, state, {"name": "x"}) or {}
            )
        return run

    return make


def test_a_run_goes_on_from_its_newest_good_checkpoint(run_of, engine, caplog, monkeypatch):
    """Not from one between skipped updates, whose weights may have diverged: a lower rate would not mend them."""
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    run = run_of({4: {}, 8: {}, 9: {"skips": 1, "skipped": (8,)}, 10: {"skipped": (8,)}})
    assert choose_checkpoint(run, "auto", engine).name == "step-00000008"
    assert "step-00000010 was saved between skipped updates" in caplog.text


@pytest.mark.parametrize("states", [{5: {"skips": 1}}, {4: {}, 5: {"skips": 1}}])
def test_where_none_is_good_or_the_run_is_done_the_newest_will_do(run_of, engine, states):
    run = run_of(states)
    if len(states) > 1:
        run = run.model_copy(update={"train": run.train.model_copy(update={"steps": 5})})
    assert choose_checkpoint(run, "auto", engine).name == "step-00000005"


def test_a_second_rollback_without_a_new_checkpoint_goes_one_further_back(run_of, engine):
    run = run_of({4: {}, 8: {}, 9: {"skips": 1, "skipped": (8,)}})
    state = RunState(step=11, batch=11, skips=3, restarts=0, order=None)
    steps = [choose_rollback(run, engine, replace(state, back_to=back_to)).name[-1] for back_to in (None, 8)]
    assert steps == ["8", "4"]
    for back_to in (4, 9):  # one was saved since; a start from an earlier one has undone what it went back to
        assert choose_rollback(run, engine, replace(state, back_to=back_to)).name[-1] == "8"


def test_a_rollback_of_before_a_stop_counts_no_more_but_one_since_does(run_of, engine):
    """The stop has set the count of rollbacks to 0; checkpoints of before it hold 2 of them."""
    run = run_of({4: {"rollbacks": 1}, 8: {"rollbacks": 2}})
    stopped = RunState(step=11, batch=11, skips=3, restarts=1, order=None)
    assert choose_rollback(run, engine, stopped).name[-1] == "8"
    assert choose_rollback(run, engine, replace(stopped, rollbacks=1, back_to=8)).name[-1] == "4"


def test_there_is_no_rollback_to_what_is_not_good(run_of, engine):
    assert choose_rollback(run_of({9: {"skips": 1}}), engine, None) is None


def test_a_resumed_run_passes_over_what_is_excluded_now_and_was_before(run_of, engine, samples, tiny_model, config):
    run = run_of({4: {"excluded": (2,)}})
    order = choose_order(config, samples)
    run = run.model_copy(update={"guard": run.guard.model_copy(update={"exclude_batches": [9, 7]})})
    write_rollbacks(run.run.folder, RunState(4, 4, 0, 0, order, excluded=(5,), rollbacks=1, lr_scale=0.5))
    state = find_start(run, "auto", engine, tiny_model, order).state
    assert (state.excluded, state.rollbacks, state.lr_scale) == ((2, 5, 7, 9), 1, 0.5)
    fresh = run.model_copy(update={"run": run.run.model_copy(update={"name": "fresh"})})
    assert find_start(fresh, "never", engine, tiny_model, order).state.excluded == (7, 9)


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
    tensors, spans = snapshot(engine, Ema([], None))
    write_tensors(tmp_path / rank_file(0), tensors)
    write_index(tmp_path, {0: spans}, engine.trained_sizes)
    state["state1"].zero_(), state["absmax1"].zero_()

    load_tensors(tmp_path, engine, Ema([], None), describe_engine(engine) | {"layout": "slices of fsdp2 on 3"})
    assert "8-bit optimizer state saved as slices of fsdp2 on 3 was quantized again" in caplog.text
    found = dequantize(state["state1"], state["absmax1"], "state1").view(-1)
    torch.testing.assert_close(found, dequantize(codes, scales, "state1"), rtol=0, atol=scales.max().item() / 70)


def saved_by_prodigy(engine, folder) -> dict[str, dict]:
    """A checkpoint as of before, with one number of each weight that began at 0; what of its state was meant."""
    model = torch.nn.Linear(64, 128)  # its bias is of one dimension, so that its state reshards
    model.device = torch.device("cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    engine.prepare(model, lambda parameters: build_optimizer(parameters, PRODIGY))
    engine.init_optimizer_state()
    states = {name: state for name, _, state in engine.optimizer_states()}
    for state in states.values():
        state["s"].normal_(), state["exp_avg"].normal_()
    tensors, spans = snapshot(engine, Ema([], None))
    assert tensors.pop("p0/bias").shape == (128,) and spans.pop("p0/bias")
    tensors |= {f"state/{name}//p0": torch.tensor(0.0) for name in states}
    write_tensors(folder / rank_file(0), tensors)
    write_index(folder, {0: spans}, engine.trained_sizes)
    return {name: {key: state[key].clone() for key in ("s", "exp_avg", "p0")} for name, state in states.items()}


def test_one_number_of_where_a_weight_began_stands_for_all(engine, tmp_path):
    meant = saved_by_prodigy(engine, tmp_path)
    described = describe_engine(engine)
    for _, _, state in engine.optimizer_states():
        state["s"].zero_(), state["exp_avg"].zero_(), state["p0"].fill_(3)  # as after another start
    load_tensors(tmp_path, engine, Ema([], None), described)
    for name, _, state in engine.optimizer_states():
        assert all(torch.equal(state[key], value) for key, value in meant[name].items())


def test_another_optimizers_state_is_told_with_what_it_is(engine, tmp_path):
    saved_by_prodigy(engine, tmp_path)
    described = describe_engine(engine)
    engine.prepare(engine.unwrap(), torch.optim.AdamW)
    told = r"not what train\.optimizer keeps here: it holds exp_avg, exp_avg_sq, s, this run exp_avg, exp_avg_sq\."
    with pytest.raises(InputError, match=told):
        load_tensors(tmp_path, engine, Ema([], None), described)
