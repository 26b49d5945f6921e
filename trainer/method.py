"""The transformer of a run, ready to train: all of its weights, or an adapter on it."""

import logging
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from configs.combinations import QUANTIZED, notes_of
from configs.errors import InputError
from configs.fit import named_fit
from configs.flux_shape import FluxShape
from configs.schema import Config, DoraConfig, LokrConfig, LoraConfig
from data.encoders.model_folder import read_part_config
from trainer.engines.base import Engine
from trainer.model.attention import choose_attention
from trainer.model.compiled_blocks import compile_blocks
from trainer.model.flux import DEV_CHANNELS, empty_transformer, load_transformer
from trainer.model.quantize import quantize_base

log = logging.getLogger("fluxfill")


def build_transformer(config: Config, model: Path, engine: Engine) -> FluxTransformer2DModel:
    """The base with 384 inputs, ready to train by the config's method.

    full: every weight trains, and is kept in fp32 or bf16 by train.weights.  Else the base is frozen in the compute
    dtype, and an adapter trains in fp32.  Raises InputError for a base that is no FLUX.1, an adapter that does not
    fit, or more checkpointed blocks than there are.
    """
    base = FluxShape.of(read_part_config(model, "transformer"))
    named_fit(config, base)  # before the weights are read
    for note in notes_of(config, engine.name):
        log.info("%s", note)
    choose_attention(config.train.attention, engine.device, engine.compute_dtype, head=base.head_width)
    method = config.method
    if config.flow.keep_target == "base" and _is_dev(model):
        raise InputError(
            f"{model / 'transformer'}: FLUX.1-dev, but flow.keep_target is base, and outside the hole dev predicts "
            "another picture: it sees neither mask nor picture. Set flow.keep_target=picture, or model.base to "
            "FLUX.1-Fill-dev."
        )
    trains_in_fp32 = method.type == "full" and config.train.weights == "fp32_master"
    dtype = torch.float32 if trains_in_fp32 else engine.compute_dtype
    if method.type != "full" and method.init_from is not None and engine.is_main:
        check_init_from(method, model)  # before the weights are read
    # Rank 0 alone reads the weights: eight ranks would hold eight copies of them in their node's memory.
    transformer = (load_transformer if engine.is_main else empty_transformer)(model, dtype=dtype)
    if config.model.precision in QUANTIZED:
        quantize_base(transformer, config.model.precision, engine.ranks.broadcast)
    if method.type != "full":
        from trainer.adapters.build import add_adapter  # with peft and transformers: half a second

        add_adapter(transformer, method, expanded=_is_dev(model), seed=config.run.seed)
    if config.train.compile == "regional":
        if method.type == "dora":
            from trainer.adapters.dora import take_norms_before_graphs

            take_norms_before_graphs(transformer)
        compile_blocks(transformer)
    counts = [sum(p.numel() for p in transformer.parameters() if p.requires_grad is wanted) for wanted in (True, False)]
    log.info("method: %s, %.1f M parameters train, %.1f M are frozen", method.type, counts[0] / 1e6, counts[1] / 1e6)
    return transformer.train()


def check_init_from(method: LoraConfig | DoraConfig | LokrConfig, model: Path) -> None:
    """Raises InputError, with all problems, if the adapter at `method.init_from` cannot go on; reads no weights of the
    model."""
    from trainer.adapters.build import adapter_ranks
    from trainer.adapters.init_from import read_start

    transformer = empty_transformer(model, dtype=torch.float32)
    is_dev = _is_dev(model)
    read_start(transformer, method, adapter_ranks(transformer, method, expanded=is_dev), expanded=is_dev)


def _is_dev(model: Path) -> bool:
    """Whether the base has FLUX.1-dev's inputs, and is expanded."""
    return read_part_config(model, "transformer").get("in_channels", DEV_CHANNELS) == DEV_CHANNELS
