"""A whole FLUX.1-Fill or FLUX.1-dev of a few million parameters, in diffusers' folder layout, without a download.

The classes, the files and the behaviour are those of FLUX.1; only the sizes differ. The VAE is the trained one of
demo/vae; the transformer and the text encoders are random from a fixed seed, with the libraries' own initialisation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.utils import logging

from configs.errors import InputError
from demo.photographs import PHOTOGRAPHS

VAE_FOLDER = Path(__file__).parent / "vae"

FILL_CHANNELS, DEV_CHANNELS = 384, 64

PROMPTS = (
    *(photograph.caption for photograph in PHOTOGRAPHS.values()),
    "upper left part, upper right part, lower left part, lower right part",
    "fill the hole with what belongs there",
    "the same photograph without the object in front of it",
    "an empty room with a sofa, a wooden floor and a window",
    "a quick brown fox jumps over the lazy dog",
    "Remove the person; keep the sky, the trees and the 2 houses (as they are)!",
)


def build_tiny_model(folder: Path, *, in_channels: int = FILL_CHANNELS) -> None:
    """Write a tiny FLUX.1 to folder: FLUX.1-Fill for in_channels 384, FLUX.1-dev for 64. The same bytes every time.

    FluxFillPipeline (FluxPipeline for 64) reads it with from_pretrained. The folder appears whole or not at all;
    one that holds this model already is left as it is.
    Raises InputError if the folder exists and holds anything else, and ValueError for other in_channels.
    """
    if in_channels not in (FILL_CHANNELS, DEV_CHANNELS):
        raise ValueError(f"in_channels is {in_channels}: FLUX.1-Fill has {FILL_CHANNELS}, FLUX.1-dev {DEV_CHANNELS}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        pipeline = _build_pipeline(in_channels)
        _save_quietly(pipeline, unfinished)
        _write_as_published(unfinished, pipeline.tokenizer)
        if not folder.exists():
            unfinished.chmod(0o755)  # mkdtemp's 0700 would lock out everyone else
            os.rename(unfinished, folder)
        elif _contents(folder) != _contents(unfinished):
            raise InputError(
                f"{folder}: exists, but does not hold this tiny model. Remove it, or give a folder that does not exist."
            )
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _save_quietly(pipeline: FluxFillPipeline | FluxPipeline, folder: Path) -> None:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one bar for every file of a few kB
    try:
        pipeline.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


# File -> (values of the published files, keys that they lack).  Today's libraries write more keys than FLUX.1's files
# have, and other values: code that reads such a key would work here and fail on the real model.  Sizes stay the tiny
# model's, with them the transformer's axes_dims_rope, which FLUX.1-dev leaves to a default that fits heads of 128.
_Differences = dict[str, tuple[dict[str, Any], tuple[str, ...]]]
_PUBLISHED: _Differences = {
    "model_index.json": ({"tokenizer_2": ["transformers", "T5TokenizerFast"]}, ("feature_extractor", "image_encoder")),
    "scheduler/scheduler_config.json": (
        {},
        (
            *("invert_sigmas", "shift_terminal", "stochastic_sampling", "time_shift_type"),
            *("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"),
        ),
    ),
    "text_encoder/config.json": (
        # Not the tokenizer's own ids, which were written here only later; transformers tells such files by the 2.
        {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "dropout": 0.0, "torch_dtype": "float32"},
        ("dtype",),
    ),
    "text_encoder_2/config.json": (
        # Of the whole T5, though its decoder is not there; the embeddings are tied all the same.
        {"is_encoder_decoder": True, "decoder_start_token_id": 0, "tie_word_embeddings": False, "use_cache": True}
        | {"output_past": True, "torch_dtype": "float32"},
        ("dtype", "is_decoder", "scale_decoder_outputs"),
    ),
    "tokenizer/tokenizer_config.json": (
        {"add_prefix_space": False, "clean_up_tokenization_spaces": True, "do_lower_case": True, "errors": "replace"},
        ("backend",),
    ),
    "tokenizer_2/tokenizer_config.json": (
        {"add_prefix_space": True, "clean_up_tokenization_spaces": True, "legacy": True, "sp_model_kwargs": {}}
        | {"additional_special_tokens": []},
        ("backend", "extra_special_tokens"),
    ),
    "vae/config.json": ({"force_upcast": True}, ()),
}
_PUBLISHED_DEV: _Differences = {"transformer/config.json": ({}, ("out_channels",))}


def _write_as_published(folder: Path, clip_tokenizer: CLIPTokenizer) -> None:
    """Give a saved model's files the keys, names and layout of the published ones."""
    is_dev = json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    for name, (values, lacking) in (_PUBLISHED | (_PUBLISHED_DEV if is_dev else {})).items():
        settings = json.loads((folder / name).read_text()) | values
        kept = {key: value for key, value in sorted(settings.items()) if key not in lacking}
        (folder / name).write_text(json.dumps(kept, indent=2) + "\n")
    # CLIP's tokenizer as the two files of its slow version, its tensors below the name of a wrapper since removed.
    (folder / "tokenizer" / "tokenizer.json").unlink()
    clip_tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _build_pipeline(in_channels: int) -> FluxFillPipeline | FluxPipeline:
    tokenizer, tokenizer_2 = _build_clip_tokenizer(), _build_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        vae = _load_vae()
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        transformer = FluxTransformer2DModel(
            in_channels=in_channels,
            # FLUX.1-dev's own config leaves it out; FLUX.1-Fill predicts 64 of its 384 channels.
            out_channels=64 if in_channels == FILL_CHANNELS else None,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
    pipeline_class = FluxFillPipeline if in_channels == FILL_CHANNELS else FluxPipeline
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=4096,
            max_shift=1.15,
            shift=3.0,
            use_dynamic_shifting=True,
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def _load_vae() -> AutoencoderKL:
    # Not from_pretrained: it notes the folder's path in the config, and two checkouts would write different bytes.
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(VAE_FOLDER))
    vae.load_state_dict(load_file(VAE_FOLDER / "diffusion_pytorch_model.safetensors"))
    return vae


# The vocabularies are spelt out, not trained: the trainers of `tokenizers` break ties by hash order, so every process
# would get other token ids.


def _build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE with CLIP's layout: bytes, bytes that end a word, merges, then the two special tokens."""
    merges: dict[tuple[str, str], None] = {}  # as an ordered set
    for word in sorted(set(re.findall(r"[a-z]+", " ".join(PROMPTS).lower()))):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            merges["".join(pieces[:end]), pieces[end]] = None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges), model_max_length=77
    )


def _build_t5_tokenizer() -> T5TokenizerFast:
    """A Unigram model of words and ASCII characters with T5's special tokens at T5's ids: <pad> 0, </s> 1, <unk> 2."""
    words = sorted(set(re.findall(r"\w+", " ".join(PROMPTS))))
    space = "\u2581"  # stands before each word
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -10.0)]
    vocab += [(space + word, -5.0) for word in words]
    vocab += [(chr(code), -10.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
