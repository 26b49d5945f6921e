#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, torch 2.13.0, on the CPU. One to three minutes to install; where pip
# finds no CPU wheel, torch brings CUDA's, several GB.
# Three common ways of naming a LoRA's tensors, each valid for FLUX.1, of which load_lora_weights loads nothing:
#   ComfyUI   diffusion_model.double_blocks.0...lora_A.weight: returned as they are; nothing is loaded, and no error is
#             raised: one log line calls it "safe to ignore"
#   peft      base_model.model.transformer_blocks.0..., what peft's save_pretrained writes of a diffusers transformer: taken
#             for a file of fal's Kontext trainer by its first word, and missing that one's tensors
#   OneTrainer lora_transformer_transformer_blocks_0_ff_net_0_proj: only the block's number and names with attn in them are
#             kept, so the feed-forward becomes transformer_blocks.0, as do the norms, each in place of the one before
# Seen, layers loaded: ComfyUI []   peft KeyError base_model.model.double_blocks.0.img_mod.lin.lora_A.weight
#   OneTrainer KeyError transformer_blocks.0.weight     and as a control, the same layer in diffusers' own names: loaded
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
PYTHONPATH=packages python3 - <<'PY'
import sys

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel


def lora(layer, rows, columns, down="lora_A.weight", up="lora_B.weight"):
    tensors = {f"{layer}.{down}": torch.ones(4, columns), f"{layer}.{up}": torch.ones(rows, 4)}
    return tensors | ({f"{layer}.alpha": torch.tensor(4.0)} if down.startswith("lora_down") else {})


def loaded(tensors):
    """Layers of a tiny FLUX that have an adapter after loading it, or the error."""
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(None, None, None, None, None, None, transformer)
    try:
        pipeline.load_lora_weights(tensors)
    except KeyError as error:
        return f"KeyError {error.args[0]}"
    return [name.removesuffix(".lora_A.default_0") for name, _ in transformer.named_modules() if name.endswith("lora_A.default_0")]


kohya = ("lora_down.weight", "lora_up.weight")
seen = {
    "ComfyUI": loaded(lora("diffusion_model.double_blocks.0.img_attn.proj", 32, 32)),
    "peft": loaded(lora("base_model.model.transformer_blocks.0.attn.to_q", 32, 32)),
    "OneTrainer": loaded(lora("lora_transformer_transformer_blocks_0_ff_net_0_proj", 128, 32, *kohya)),
    "diffusers": loaded(lora("transformer.transformer_blocks.0.attn.to_q", 32, 32)),
}
for names, layers in seen.items():
    print(f"{names}: {layers}")
expected = {
    "ComfyUI": [],
    "peft": "KeyError base_model.model.double_blocks.0.img_mod.lin.lora_A.weight",
    "OneTrainer": "KeyError transformer_blocks.0.weight",
    "diffusers": ["transformer_blocks.0.attn.to_q"],
}
sys.exit(seen != expected and f"changed: {expected} before")
PY
