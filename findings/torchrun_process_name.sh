#!/usr/bin/env bash
# torch 2.13.0, on the CPU, Linux. One to three minutes to install; where pip finds no CPU wheel, CUDA's comes: several GB.
# torchrun renames its own process: what a rank's parent is called by the kernel (/proc/PID/comm, ps -o comm, pgrep) is
# "pt_elastic", neither torchrun nor python, and the rank itself keeps python's name. A rank that asks by name whether its
# parent is its launcher, or an init process that has adopted it, takes a launcher for neither: in a container whose
# process 1 is torchrun, for an adoption. The command line (/proc/PID/cmdline, pgrep -f) still says torch.distributed.run.
# Seen: parent comm pt_elastic, parent cmdline has torch.distributed.run; own comm python3 or the interpreter's name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages torch==2.13.0 numpy==2.4.6
cat >rank.py <<'PY'
import os
import sys
from pathlib import Path


def comm(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


parent = os.getppid()
line = Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ").decode()
print(f"parent: comm {comm(parent)!r}, torch.distributed.run in its command line: {'torch.distributed.run' in line}")
print(f"rank: comm {comm(os.getpid())!r}")
seen = (comm(parent), "torch.distributed.run" in line, comm(os.getpid()) == "pt_elastic")
sys.exit(seen != ("pt_elastic", True, False) and f"changed: ('pt_elastic', True, False) before, now {seen}")
PY
OMP_NUM_THREADS=1 PYTHONPATH=packages python3 -W ignore -m torch.distributed.run --standalone --nproc-per-node 1 rank.py
