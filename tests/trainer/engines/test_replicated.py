"""Engines whose ranks hold copies: DDP's gradients lie in its buckets, and copies stay copies."""

import pytest

from tests.trainer.engines.runs import SINGLE, STEPS, read_losses


def test_ddp_has_no_gradients_beside_those_that_it_exchanges(undisturbed, resumed):
    """From the first micro-step on, after a resume too: whatever is exchanged comes to lie in DDP's buckets."""
    for run in (undisturbed("ddp", 2), resumed(("ddp", 2), ("ddp", 2))):
        for watched in run.returned:
            assert watched.is_last.count(False) >= STEPS / 2  # micro-steps that exchange nothing
            assert len(watched.addresses) == len(watched.is_last) and len(watched.addresses[0]) > 100
            assert all(addresses == watched.addresses[0] for addresses in watched.addresses)


def test_ddp_sends_no_buffers_before_a_forward_pass(undisturbed):
    """Scales of a quantized base: 504 of FLUX.1's, which never change."""
    assert [watched.sends_buffers for watched in undisturbed("ddp", 2).returned] == [False, False]


def train_with_another_ddp(arguments: list[str]) -> bool:
    """The trainer, where DDP's buckets cannot be rebuilt while the model is prepared; whether that was logged."""
    import logging

    from torch.distributed import Reducer

    from trainer.engines.base import Engine
    from trainer.main import train

    logged: list[str] = []
    logging.getLogger("fluxfill").addFilter(lambda record: logged.append(record.getMessage()) or True)
    prepare, rebuild = Engine.prepare, Reducer._rebuild_buckets

    def prepare_without(self, transformer, build_optimizer):
        del Reducer._rebuild_buckets
        prepared = prepare(self, transformer, build_optimizer)
        Reducer._rebuild_buckets = rebuild  # DDP's forward pass calls it too
        return prepared

    Engine.prepare = prepare_without
    train(arguments)
    return any("another DDP" in message for message in logged)


@pytest.mark.slow
def test_ddp_trains_on_where_its_buckets_cannot_be_laid_out_first(launch, undisturbed):
    run = launch("ddp", 2, "another-ddp", function=train_with_another_ddp)
    assert all(run.returned)
    assert read_losses(run.folder) == pytest.approx(read_losses(undisturbed(*SINGLE).folder), abs=1e-5)


def train_and_add_up(arguments: list[str]) -> list[float]:
    """The trainer; returns the sum of this rank's weights, each."""
    from trainer import main

    sums = []
    main.export_and_verify = lambda config, engine, model, ema: sums.extend(
        weight.double().sum().item() for weight in engine.unwrap().parameters()
    )
    main.train(arguments)
    return sums


@pytest.mark.slow
def test_copies_of_bf16_weights_are_rounded_alike(launch):
    settings = ("train.weights=bf16_stochastic", "train.optimizer=adamw", "train.steps=2", "train.warmup_steps=1")
    first, second = launch("ddp", 2, "rounded-copies", *settings, function=train_and_add_up).returned
    assert len(first) > 100
    assert first == second


def end_without_yielding(arguments: list[str]) -> list[bool]:
    """The trainer, in whose end Python lets gloo's threads in only where it waits itself; returns whether DDP's reducer
    was gone when the process group ended."""
    import sys

    from accelerate import Accelerator

    from trainer import main

    engines, gone, start, end = [], [], main.start_engine, Accelerator.end_training
    main.start_engine = lambda config: engines.append(start(config)) or engines[0]
    main.export_and_verify = lambda *_: sys.setswitchinterval(60)
    Accelerator.end_training = lambda self: (gone.append(not hasattr(engines[0]._transformer, "reducer")), end(self))
    main.train(arguments)
    return gone


def test_ddp_ends_though_gloo_still_holds_what_it_sent_last(launch):
    """Its threads need the interpreter to let go of it, and DDP's reducer must not wait for them with the interpreter
    held."""
    short = ("train.steps=1", "train.warmup_steps=0", "checkpoint.every_steps=null", "checkpoint.at_end=false")
    assert launch("ddp", 4, "ends", *short, function=end_without_yielding).returned == [[True]] * 4
