#!/usr/bin/env bash
# torch 2.13.0, two processes on the CPU. One to three minutes to install; where pip finds no CPU wheel, CUDA's comes:
# several GB.
# A NaN on rank 0 reaches both ranks of an all_reduce by gloo with MAX or MIN; one on rank 1 reaches neither, itself
# included: comparisons with NaN are false, and the first number stays. torch.max of the same two numbers is NaN in
# either order. A check of losses or gradient norms by MAX can so pass over a NaN. SUM spreads it always.
# Seen, on both ranks, the other rank's number being 1:
#   NaN on rank 0: MAX nan, MIN nan, SUM nan     NaN on rank 1: MAX 1.0, MIN 1.0, SUM nan
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


def reduce_all(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = {}
    for with_nan in (0, 1):
        for name in ("MAX", "MIN", "SUM"):
            number = torch.tensor(float("nan") if rank == with_nan else 1.0)
            dist.all_reduce(number, getattr(dist.ReduceOp, name))
            seen[f"NaN on rank {with_nan}, {name}"] = str(number.item())
    print(f"rank {rank}: {seen}\n", end="", flush=True)
    dist.destroy_process_group()
    expected = dict(zip(seen, ("nan", "nan", "nan", "1.0", "1.0", "nan"), strict=True))
    sys.exit(seen != expected and f"changed: {expected} before")


if __name__ == "__main__":
    mp.spawn(reduce_all, (sys.argv[1],), nprocs=2)
PY
OMP_NUM_THREADS=1 PYTHONPATH=packages python3 -W ignore ranks.py "$work"
