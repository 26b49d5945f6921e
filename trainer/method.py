"""The transformer of a run, ready to train: all of its weights, or an adapter on it."""

import logging
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from configs.combinations import QUANTIZED, notes_of
from configs.schema import Config
from data.encoders.model_folder import read_part_config
from trainer.engines.base import Engine
from trainer.model.flux import DEV_CHANNELS, empty_transformer, load_transformer
from trainer.model.quantize import quantize_base

log = logging.getLogger("fluxfill")


def build_transformer(config: Config, model: Path, engine: Engine) -> FluxTransformer2DModel:
    """The base with 384 inputs, ready to train by the config's method.

    full: every weight trains, and is kept in fp32 or bf16 by train.weights.  Else the base is frozen in the compute
    dtype, and an adapter trains in fp32.  Raises InputError for a base that is no FLUX.1, or an adapter that does not
    fit.
    """
    for note in notes_of(config, engine.name):
        log.info("%s", note)
    method = config.method
    trains_in_fp32 = method.type == "full" and config.train.weights == "fp32_master"
    dtype = torch.float32 if trains_in_fp32 else engine.compute_dtype
    # Rank 0 alone reads the weights: eight ranks would hold eight copies of them in their node's memory.
    transformer = (load_transformer if engine.is_main else empty_transformer)(model, dtype=dtype)
    if config.model.precision in QUANTIZED:
        quantize_base(transformer, config.model.precision, engine.ranks.broadcast)
    if method.type != "full":
        from trainer.adapters.build import add_adapter  # with peft and transformers: half a second

        expanded = read_part_config(model, "transformer").get("in_channels", DEV_CHANNELS) == DEV_CHANNELS
        add_adapter(transformer, method, expanded=expanded, seed=config.run.seed)
    if checkpoints_activations(config, engine):
        transformer.enable_gradient_checkpointing()
    if config.train.compile == "regional":
        # Blocks of one kind share a graph. Dynamic from the start: were the first sizes taken for fixed, a later one
        # could be compiled again between a forward pass and its recomputation, which then do not match.
        transformer.compile_repeated_blocks(dynamic=True)
        torch._dynamo.config.optimize_ddp = False  # it cuts graphs where DDP's messages begin
    counts = [sum(p.numel() for p in transformer.parameters() if p.requires_grad is wanted) for wanted in (True, False)]
    log.info("method: %s, %.1f M parameters train, %.1f M are frozen", method.type, counts[0] / 1e6, counts[1] / 1e6)
    return transformer.train()


def checkpoints_activations(config: Config, engine: Engine) -> bool:
    """Whether activations are checkpointed. auto: on a GPU, where 41 GiB of them per 1024 px sample decide what fits,
    yes; on a CPU no."""
    chosen = config.train.activation_checkpointing
    if chosen == "auto":
        chosen = engine.device.type == "cuda"
        log.info("train.activation_checkpointing: auto, so %s", chosen)
    return chosen
