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

if __name__ == "__main__":
    install_stop_signals()  # now, not after ten seconds of imports; and what is wrong with a config is said now
    if code := run_and_report(check_command_line):
        sys.exit(code)
    gc.disable()  # imports leave no garbage, and looking for it takes a fifth of their time

lighten_imports()

from data.batches.micro_batch import unpack_mask
from data.encoders.model_folder import find_model
from trainer.checkpoints.resume import resume
from trainer.checkpoints.save import Saver
from trainer.engines.ema import Ema
from trainer.engines.start import start_engine
from trainer.export.finish import export_and_verify
from trainer.method import build_transformer
from trainer.model.flow import flow_loss, mix_noise, region_weight, sample_sigma
from trainer.model.flux import predict_velocity
from trainer.optimizers.optimizer import build_optimizer, learning_rate
from trainer.run_log import RunLog, configure_logging
from trainer.training_data import choose_order, open_samples, open_stream
from trainer.validation.validator import Validator, validation_is_due


def train(arguments: list[str] | None = None) -> int:
    """Train from the first or resumed step to the last; returns the step that was reached."""
    config, resume_from = read_command_line(arguments)
    engine = start_engine(config)  # the processes; the engine that was asked for, or an error
    console = configure_logging(engine)
    model = find_model(config.model.base)
    samples = open_samples(config, model, engine, console)  # the VAE's and the text encoders' work is that of data/
    order = choose_order(config, samples, num_nodes=engine.num_nodes)  # in which they come: fixed for the run
    transformer = build_transformer(config, model, engine)  # 384 inputs; all of it trains, or an adapter
    transformer = engine.prepare(transformer, partial(build_optimizer, train=config.train, seed=config.run.seed))
    ema = Ema(engine.local_slices(), config.train.ema_decay)
    state = resume(config, resume_from, engine, ema, order)
    with open_stream(config, engine, samples, state) as stream:
        log = RunLog(config, engine, state, console)
        saver = Saver(config, engine, ema, stream)
        validator = Validator(config, engine, model, samples)
        if validation_is_due(config, 0) and state.step == 0:
            log.validation(validator.run(engine.unwrap(), 0))

        while state.step < config.train.steps:  # step = one optimizer update
            for rows in engine.micro_steps(next(stream)):  # this rank's rows of the global batch
                sigma = sample_sigma(rows.uniform, rows.bucket.tokens, config.flow)
                noisy = mix_noise(rows.latents, rows.noise, sigma)  # sigma 0: clean, 1: noise
                with engine.autocast():
                    velocity = predict_velocity(transformer, noisy, rows, sigma, config.flow)
                region = region_weight(unpack_mask(rows.mask), config.flow)  # of the hole and the kept part
                losses = flow_loss(velocity, rows.latents, rows.noise, region)  # against noise - latents
                engine.backward(losses, rows.weight)  # sum over the real rows / global batch size
            lr = learning_rate(config.train, state.step)
            update = engine.step(lr)  # clip and apply, if finite on all ranks
            if update.applied:
                ema.update(state.step)
            state = state.after(update)
            log.step(state, update, lr, stream)
            if validation_is_due(config, state.step):
                log.validation(validator.run(engine.unwrap(), state.step))
            saver.save_if_due(state, stopping=update.stop)
            if update.stop and state.step < config.train.steps:
                raise Stopped(state.step, stop_signal())

    export_and_verify(config, engine, model, ema)
    log.close()
    engine.close()
    return state.step


if __name__ == "__main__":
    gc.freeze()  # neither a collection nor the exit goes through all that was imported
    gc.enable()
    sys.exit(run_and_report(train))
