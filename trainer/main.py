"""Train FLUX.1-Fill as a config says; this page is the method.

accelerate launch trainer/main.py --config configs/fill_lora.yaml [--resume auto] [key=value ...]
"""

import gc
import sys
from functools import partial

from configs.lighter_imports import lighten_imports
from trainer.process.command_line import check_command_line, read_command_line
from trainer.process.outcome import Stopped, run_and_report
from trainer.process.stop_signals import install_stop_signals, stop_signal
from trainer.process.watchdog import watch_for_hangs

if __name__ == "__main__":
    install_stop_signals()  # now, not after ten seconds of imports; and what is wrong with a config is said now
    if code := run_and_report(check_command_line):
        sys.exit(code)
    gc.disable()  # imports leave no garbage, and looking for it takes a fifth of their time
lighten_imports()

from data.encoders.model_folder import find_model
from trainer.checkpoints.resume import find_start, load_state
from trainer.checkpoints.save import Saver
from trainer.engines.ema import Ema
from trainer.engines.memory_limit import micro_batch_limit, smaller_when_out_of_memory
from trainer.engines.start import start_engine
from trainer.export.finish import export_and_verify
from trainer.fit import fit_to_memory
from trainer.guard import Guard, loss_limit
from trainer.method import build_transformer
from trainer.model.flow import flow_loss, mix_noise, region_weight, sample_sigma, velocity_target
from trainer.model.flux import predict_velocity
from trainer.optimizers.optimizer import build_optimizer, learning_rate
from trainer.run_log import RunLog, configure_logging
from trainer.training_data import choose_order, open_samples, open_stream
from trainer.validation.validator import Validator


def train(arguments: list[str] | None = None) -> int:
    """Train from the first or resumed step to the last; returns the step that was reached."""
    config, resume_from = read_command_line(arguments)
    engine = start_engine(config)  # the processes; the engine that was asked for, or an error
    console = configure_logging(engine)
    model = find_model(config.model.base)
    samples = open_samples(config, model, engine, console)  # the VAE's and the text encoders' work is that of data/
    order = choose_order(config, samples, num_nodes=engine.num_nodes)  # in which they come: fixed for the run
    start = find_start(config, resume_from, engine, model, order)  # afresh, or from this run's checkpoint
    transformer = build_transformer(config, model, engine)  # 384 inputs; all of it trains, or an adapter
    transformer = engine.prepare(transformer, partial(build_optimizer, train=config.train, seed=config.run.seed))
    micro_batch_size = fit_to_memory(config, engine, model, samples, at_most=micro_batch_limit(config, engine))
    ema = Ema(engine.local_slices(), config.train.ema_decay)
    state = load_state(config, start, engine, ema)
    with (
        open_stream(config, engine, samples, state, micro_batch_size) as stream,
        watch_for_hangs(config.run.folder, config.guard.step_timeout_minutes),
        smaller_when_out_of_memory(config, engine, transformer, stream),
    ):
        log = RunLog(config, engine, state, console)
        saver = Saver(config, engine, ema, stream)
        validator = Validator(config, engine, model, samples, saver.commit_if_written, ema)
        guard = Guard(config, engine, ema, samples, stream, saver, log)
        if not log.has_validation(state.step):  # step 0, or one that was cut short
            log.validation(validator.run_if_due(engine.unwrap(), state.step))
        stopping = engine.told_to_stop()
        while state.step < config.train.steps and not stopping:  # step = one optimizer update
            for rows in engine.micro_steps(next(stream)):  # this rank's rows of the global batch
                sigma = sample_sigma(rows.uniform, rows.bucket.tokens, config.flow)
                noisy = mix_noise(rows.latents, rows.noise, sigma)  # sigma 0: clean, 1: noise
                target = velocity_target(engine.unwrap(), noisy, rows, sigma, config.flow)  # noise - latents
                velocity = predict_velocity(transformer, noisy, rows, sigma, config.flow)
                region = region_weight(rows.hole, config.flow, rows.unmasked)  # of the hole and the kept part
                losses = flow_loss(velocity, target, region)
                engine.backward(losses, rows.weight)  # sum over the real rows / global batch size
            lr = learning_rate(config.train, state.step) * state.lr_scale
            update = engine.step(lr, loss_limit(config.guard, state))  # clip and apply, if finite on all ranks
            if update.applied:
                ema.update(state.step)
            state = state.after(update)
            log.step(state, update, lr, stream)
            if not update.applied and (back := guard.skip(state, update)):  # told; too many in a row: go back
                state = back  # the last good checkpoint, past the bad batches, at a lower rate
                continue
            stopping = update.stop
            if wrong := saver.save_if_due(state, stopping=stopping):  # weights, moments or averages are not finite
                state = guard.roll_back(state, wrong)
                continue
            if not stopping:
                log.validation(validator.run_if_due(engine.unwrap(), state.step))
    if engine.told_to_stop():
        raise Stopped(state.step, stop_signal(), saver.saved_step)
    export_and_verify(config, engine, model, ema)
    saver.refuse_unsaved_end()  # of a full disk: what is in final/ is not all
    log.close()
    engine.close()
    return state.step


if __name__ == "__main__":
    gc.freeze()  # neither a collection nor the exit goes through all that was imported
    gc.enable()
    sys.exit(run_and_report(train))
