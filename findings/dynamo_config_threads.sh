#!/usr/bin/env bash
# torch 2.13.0, one process on the CPU. One to three minutes to install; where pip finds no CPU wheel, CUDA's comes:
# several GB.
# What a program sets in torch._dynamo.config is set for the thread that set it; in all others torch's defaults hold.
# On a GPU the backward pass runs in a thread of autograd's own, and with activation checkpointing so does the forward
# pass that is computed again: compiled blocks then look for their graphs, or have more made, under settings that nobody
# chose. On a CPU the backward pass runs in the thread that asked for it, so no test there sees it.
# Seen, of torch._dynamo.config.recompile_limit = 32 (8 by default):
#   where it was set 32     another thread 8     another thread, in a copied context 32
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages torch==2.13.0 numpy==2.4.6
cat >threads.py <<'PY'
import contextvars
import sys
from concurrent.futures import ThreadPoolExecutor

import torch._dynamo


def limit():
    return torch._dynamo.config.recompile_limit


torch._dynamo.config.recompile_limit = 32
with ThreadPoolExecutor(1) as pool:
    seen = {
        "where it was set": limit(),
        "another thread": pool.submit(limit).result(),
        "another thread, in a copied context": pool.submit(contextvars.copy_context().run, limit).result(),
    }
print(seen)
expected = dict(zip(seen, (32, 8, 32), strict=True))
sys.exit(seen != expected and f"changed: {expected} before")
PY
PYTHONPATH=packages python3 -W ignore threads.py
