#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, torch 2.13.0, on the CPU. One to three minutes to install; where pip
# finds no CPU wheel, torch brings CUDA's, several GB.
# A transformer's load_lora_adapter does not load what its save_lora_adapter wrote. It looks for a .bin unless the file
# is named or use_safetensors is True. Then it takes only names that begin with "transformer.", the default prefix, with
# which the file has none: nothing is loaded, which a log line calls "safe to ignore".
# Seen, of an adapter on two layers, layers that have it after loading:
#   load_lora_adapter(folder) OSError: no file named pytorch_lora_weights.bin    use_safetensors=True: 0
#   use_safetensors=True, prefix=None: 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
PYTHONPATH=packages python3 - <<'PY'
import sys

from diffusers import FluxTransformer2DModel
from peft import LoraConfig


def build():
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )


def loaded(**settings):
    """How many layers of a new transformer have the saved adapter after load_lora_adapter, or the error."""
    transformer = build()
    try:
        transformer.load_lora_adapter("saved", **settings)
    except OSError as error:
        return str(error).partition(" found")[0]
    return sum(name.endswith("lora_A.default_0") for name, _ in transformer.named_modules())


transformer = build()
transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
transformer.save_lora_adapter("saved")
seen = [loaded(), loaded(use_safetensors=True), loaded(use_safetensors=True, prefix=None)]
print(seen)
expected = ["Error no file named pytorch_lora_weights.bin", 0, 2]
sys.exit(seen != expected and f"changed: {expected} before")
PY
