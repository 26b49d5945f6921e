"""A whole FLUX.1-Fill or FLUX.1-dev of a few million parameters, in diffusers' folder layout, without a download.

The classes, the files and the behaviour are those of FLUX.1; only the sizes differ. The VAE is the trained one of
demo/vae; the transformer and the text encoders are random from a fixed seed, with the libraries' own initialisation.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file
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
        _save_quietly(_build_pipeline(in_channels), unfinished)
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
