#!/usr/bin/env bash
# diffusers 0.42.1, numpy 2.4.6. No torch. Up to a minute to install.
# A part's config names the keys that its config.json left out in _use_default_values. register_to_config changes a
# value and leaves its name there, and from_config passes over every name in that list: a copy made by
# Model.from_config(model.config) has the old default again, while keys that the file did name have the new value. Saved
# and loaded, the list is gone and both are right. FLUX.1-dev's published transformer config has no out_channels.
# Seen, from {"in_channels": 64}, then register_to_config(in_channels=384, out_channels=64):
#   config (384, 64)   from_config(config) (384, None)   save_config and load_config (384, 64)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages diffusers==0.42.1 numpy==2.4.6
PYTHONPATH=packages python3 - <<'PY'
import sys

from diffusers.configuration_utils import ConfigMixin, register_to_config


class Projection(ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self, in_channels: int = 64, out_channels: int | None = None):
        """out_channels: in_channels if None, as in FluxTransformer2DModel."""


def channels(part):
    return part.config.in_channels, part.config.out_channels


projection = Projection.from_config({"in_channels": 64})
projection.register_to_config(in_channels=384, out_channels=64)
copy = Projection.from_config(projection.config)
projection.save_config("saved")
loaded = Projection.from_config(Projection.load_config("saved"))
seen = [channels(part) for part in (projection, copy, loaded)]
print(f"config {seen[0]}, from_config(config) {seen[1]}, saved and loaded {seen[2]}")
sys.exit(seen != [(384, 64), (384, None), (384, 64)] and "changed")
PY
