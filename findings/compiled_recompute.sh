#!/usr/bin/env bash
# torch 2.13.0, one process on the CPU. One to three minutes to install; where pip finds no CPU wheel, CUDA's comes:
# several GB.
# An autograd Function that keeps a weight in 8 bits and makes it whole in the forward pass, and again in the backward
# pass, keeps the whole weight once it is compiled: AOTAutograd traces both passes into one graph, finds the two
# conversions to be the same, and its partitioner does not compute again what a matrix product of the backward pass
# reads. So `torch.compile` undoes what the Function is for, in silence, at two bytes a weight, whatever the backend.
# torch._functorch.config.ban_recompute_materialized_backward = False gives it back, and so does cse = False.
# Seen, the dtypes of what is kept of a [64, 32] weight:
#   eager int8     compiled bfloat16     compiled without that ban int8     without cse int8
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages torch==2.13.0 numpy==2.4.6
cat >kept.py <<'PY'
import sys

import torch
from torch._functorch import config

WEIGHT = torch.randint(-127, 127, (64, 32), dtype=torch.int8)


class MadeWholeTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.to(torch.bfloat16).t()

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(torch.bfloat16), None


def kept(function):
    found = set()

    def look(tensor):
        if tensor.numel() == WEIGHT.numel():
            found.add(str(tensor.dtype).removeprefix("torch."))
        return tensor

    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        out = function(x, WEIGHT)
    out.sum().backward()
    return ", ".join(sorted(found))


def compiled():
    torch._dynamo.reset()
    return torch.compile(MadeWholeTwice.apply, backend="aot_eager_decomp_partition", fullgraph=True)


seen = {"eager": kept(MadeWholeTwice.apply), "compiled": kept(compiled())}
for name in ("ban_recompute_materialized_backward", "cse"):
    with config.patch(**{name: False}):
        seen[f"without {name}"] = kept(compiled())
print(seen)
expected = dict(zip(seen, ("int8", "bfloat16", "int8", "int8"), strict=True))
sys.exit(seen != expected and f"changed: {expected} before")
PY
PYTHONPATH=packages python3 -W ignore kept.py
