#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, torch 2.13.0, on the CPU. One to three minutes to install; where pip
# finds no CPU wheel, torch brings CUDA's, several GB.
# A LoRA of sd-scripts may train the layers around the blocks of FLUX (img_in, txt_in, time_in, vector_in, final_layer).
# They are converted to diffusers' names, but without the "transformer." that those of the blocks get, and load_lora_weights
# then passes over all that do not begin so: of a file with both, the blocks are loaded and the others dropped in silence.
# What is converted of final_layer has lost its alpha, too.
# Seen, of attn.proj in a block, img_in and final_layer.linear, of alpha 1 and rank 4:
#   names: transformer.transformer_blocks.0.attn.to_out.0, x_embedder, proj_out     loaded: the first alone
#   strength of what was converted, against alpha / rank x up x down: 1, 1, 4
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

RANK, ALPHA = 4, 1.0
LAYERS = {  # sd-scripts' name -> (diffusers' name, rows, columns)
    "lora_unet_double_blocks_0_img_attn_proj": ("transformer_blocks.0.attn.to_out.0", 32, 32),
    "lora_unet_img_in": ("x_embedder", 32, 16),
    "lora_unet_final_layer_linear": ("proj_out", 16, 32),
}
torch.manual_seed(0)
file = {}
for name, (_, rows, columns) in LAYERS.items():
    file[f"{name}.lora_down.weight"] = torch.randn(RANK, columns)
    file[f"{name}.lora_up.weight"] = torch.randn(rows, RANK)
    file[f"{name}.alpha"] = torch.tensor(ALPHA)

converted = FluxPipeline.lora_state_dict(dict(file))
names, strengths = [], []
for name, (ours, _, _) in LAYERS.items():
    found = next(key for key in converted if key.removeprefix("transformer.") == f"{ours}.lora_A.weight")
    product = converted[found.replace("lora_A", "lora_B")] @ converted[found]
    meant = file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"] * ALPHA / RANK
    names.append(found.removesuffix(".lora_A.weight"))
    strengths.append(round((product.norm() / meant.norm()).item(), 3))
transformer = FluxTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)
FluxPipeline(None, None, None, None, None, None, transformer).load_lora_weights(dict(file))
adapted = [name for name, _ in transformer.named_modules() if name.endswith("lora_A.default_0")]
loaded = [name.removesuffix(".lora_A.default_0") for name in adapted]
print(f"names {names}, strengths {strengths}, loaded {loaded}")
expected = (
    ["transformer.transformer_blocks.0.attn.to_out.0", "x_embedder", "proj_out"],
    [1.0, 1.0, 4.0],
    ["transformer_blocks.0.attn.to_out.0"],
)
sys.exit((names, strengths, loaded) != expected and f"changed: {expected} before")
PY
