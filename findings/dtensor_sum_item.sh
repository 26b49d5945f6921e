#!/usr/bin/env bash
# torch 2.13.0, two processes on the CPU. One to three minutes to install; where pip finds no CPU wheel, CUDA's comes:
# several GB.
# item() and float() of a sharded DTensor's sum, mean or max give each rank the figure of its own shard, with no word:
# the result is a DTensor that is still to be reduced (Partial), and item() takes what is there. Doubled it is so still;
# with 0 added it is reduced first, and argmax of the same tensor is that of all. full_tensor() is right for each. On
# one rank all of them agree, so nothing shows before there is a second.
# Seen, of [1, 2 | 3, 4] on ranks 0 | 1:
#   sum 3 | 7   max 2 | 4   mean 1.5 | 3.5   sum * 2 6 | 14   sum + 0 10 | 10   argmax 3 | 3   sum.full_tensor 10 | 10
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages torch==2.13.0 numpy==2.4.6
cat >ranks.py <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def figures(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    numbers = distribute_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0]), init_device_mesh("cpu", (2,)), [Shard(0)])
    total = numbers.sum()
    seen = {"sum": total.item(), "max": numbers.max().item(), "mean": numbers.mean().item()}
    seen |= {"sum * 2": (total * 2).item(), "sum + 0": (total + 0).item(), "argmax": numbers.argmax().item()}
    seen |= {"full_tensor": total.full_tensor().item()}
    print(f"rank {rank}: {seen}\n", end="", flush=True)
    dist.destroy_process_group()
    expected = ([3.0, 2.0, 1.5, 6.0, 10.0, 3, 10.0], [7.0, 4.0, 3.5, 14.0, 10.0, 3, 10.0])[rank]
    sys.exit(list(seen.values()) != expected and f"changed: {expected} before")


if __name__ == "__main__":
    mp.spawn(figures, (sys.argv[1],), nprocs=2)
PY
OMP_NUM_THREADS=1 PYTHONPATH=packages python3 -W ignore ranks.py "$work"
