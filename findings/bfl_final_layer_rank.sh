#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, torch 2.13.0, on the CPU. One to three minutes to install; where pip
# finds no CPU wheel, torch brings CUDA's, several GB.
# FLUX's own final layer has shift before scale, diffusers' norm_out has scale first, so a LoRA's up matrix (lora_B) has
# its halves swapped. In files named as Black Forest Labs' control LoRAs (Canny, Depth) the down matrix is swapped, too:
# its rows are not shift and scale but the rank, so up and down no longer belong together. The loaded layer is another.
# Seen, of a file with random numbers in final_layer.adaLN_modulation.1, rank 4:
#   of 48 numbers of up x down 0 are right; with the down matrix as it was in the file, all 48
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
PYTHONPATH=packages python3 - <<'PY'
import sys

import torch
from diffusers import FluxPipeline

OUTER = "time_in.in_layer time_in.out_layer vector_in.in_layer vector_in.out_layer txt_in img_in final_layer.linear"
DOUBLE = "mod.lin attn.qkv attn.proj mlp.0 mlp.2"
NORMS = "norm.query_norm.scale norm.key_norm.scale"
names, norms = OUTER.split(), []
for block in range(19):
    names += [f"double_blocks.{block}.{side}_{name}" for side in ("img", "txt") for name in DOUBLE.split()]
    norms += [f"double_blocks.{block}.{side}_attn.{name}" for side in ("img", "txt") for name in NORMS.split()]
for block in range(38):
    names += [f"single_blocks.{block}.{name}" for name in ("modulation.lin", "linear1", "linear2")]
    norms += [f"single_blocks.{block}.{name}" for name in NORMS.split()]
rows = {"qkv": 3 * 3072, "linear1": 7 * 3072}  # which are cut by their sizes
file = {f"{name}.lora_A.weight": torch.empty(4, 6, device="meta") for name in names}
file |= {f"{name}.lora_B.weight": torch.empty(rows.get(name.split(".")[-1], 8), 4, device="meta") for name in names}
file |= {norm: torch.empty(128, device="meta") for norm in norms}

torch.manual_seed(0)
down, up = torch.randn(4, 6), torch.randn(8, 4)
layer = "final_layer.adaLN_modulation.1"
converted = FluxPipeline.lora_state_dict({**file, f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
new_down, new_up = (converted[f"transformer.norm_out.linear.{name}.weight"] for name in ("lora_A", "lora_B"))
shift, scale = (up @ down).chunk(2)
meant = torch.cat([scale, shift])
right = [torch.isclose(product, meant, atol=1e-5).sum().item() for product in (new_up @ new_down, new_up @ down)]
print(f"of {meant.numel()} numbers right: {right[0]}; with the file's own down matrix: {right[1]}")
sys.exit(right != [0, 48] and "changed")
PY
