#!/usr/bin/env bash
# webdataset 1.0.2, accelerate 1.15.0, torch 2.13.0, two processes on the CPU. One to three minutes to install; off the
# CPU wheels torch brings CUDA's, several GB.
# WebDataset(nodesplitter=split_by_node) deals shards out to ranks, and accelerator.prepare deals batches out again: of
# an iterable dataset rank 0 alone reads, and hands each rank a part. What it reads is its own half, so half of the
# samples are never seen, in any epoch, by N ranks all but one in N; each rank has its even share of the rest, and no
# count looks wrong. Without a nodesplitter, against webdataset's advice for several ranks, all are seen.
# Seen, sixteen samples in four shards: split_by_node 8 different ones, no nodesplitter 16
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages webdataset==1.0.2 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cat >ranks.py <<'PY'
import io
import os
import sys
import tarfile

import torch.distributed as dist
import torch.multiprocessing as mp
import webdataset
from accelerate import Accelerator
from torch.utils.data import DataLoader


def read(rank, folder):
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="unused", MASTER_PORT="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    accelerator, counts = Accelerator(cpu=True), []
    for nodesplitter in (webdataset.split_by_node, None):
        shards = [f"{folder}/{shard}.tar" for shard in range(4)]
        samples = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=nodesplitter).decode()
        loader = accelerator.prepare(DataLoader(samples.map(lambda sample: sample["cls"]), batch_size=2))
        ranks = [None, None]
        dist.all_gather_object(ranks, [number for batch in loader for number in batch.tolist()])
        counts.append(len(set(sum(ranks, []))))
        print(f"{'split_by_node' if nodesplitter else 'no nodesplitter'}: {ranks}\n" * (rank == 0), end="", flush=True)
    dist.destroy_process_group()
    sys.exit(counts != [8, 16] and f"changed: {counts} different samples, 8 and 16 before")


if __name__ == "__main__":
    for shard in range(4):
        with tarfile.open(f"{shard}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                member = tarfile.TarInfo(f"{number}.cls")
                member.size = len(str(number))
                tar.addfile(member, io.BytesIO(str(number).encode()))
    mp.spawn(read, (sys.argv[1],), nprocs=2)
PY
OMP_NUM_THREADS=1 PYTHONPATH=packages python3 -W ignore ranks.py "$work"
