#!/usr/bin/env bash
# transformers 5.23.0. No torch. Up to a minute to install.
# T5Config takes tie_word_embeddings=False and says True. The key is read for something else, whether the decoder scales
# what it puts out, and kept as scale_decoder_outputs, which older files do not have. save_pretrained writes true where
# the file it came from said false. Set on the object afterwards, False stays and is saved, and the next from_pretrained
# says True again.
# Seen:
#   read from a file of false: tie_word_embeddings True, scale_decoder_outputs False; saved: true and false
#   set to False, saved as false, read again: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages transformers==5.23.0
PYTHONPATH=packages python3 - <<'PY'
import json
import sys
from pathlib import Path

from transformers import T5Config


def stored(folder):
    return json.loads(Path(folder, "config.json").read_text())["tie_word_embeddings"]


Path("published").mkdir()
Path("published/config.json").write_text(
    json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
)
config = T5Config.from_pretrained("published")
config.save_pretrained("saved")
seen = {"read": (config.tie_word_embeddings, config.scale_decoder_outputs), "saved": stored("saved")}
config.tie_word_embeddings = False
config.save_pretrained("set")
seen |= {"set and saved": stored("set"), "read again": T5Config.from_pretrained("set").tie_word_embeddings}
print(seen)
expected = {"read": (True, False), "saved": True, "set and saved": False, "read again": True}
sys.exit(seen != expected and f"changed: {expected} before")
PY
