#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4.6. Seconds.
# save_file writes the same tensors with the same metadata in another order of the metadata's keys at every call: the
# header is made from a hash map with a random seed. So two saves of one model have different hashes, though they mean
# the same, and a checksum or a content-addressed store takes them for two. With one key, or none, the bytes are the same.
# Seen, hashes of 10 saves, each by a process of its own:
#   of 6 keys of metadata 10, or 9; of one key 1; the tensors' bytes behind the header 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages safetensors==0.8.0 numpy==2.4.6
cat >save.py <<'PY'
import sys

import numpy
from safetensors.numpy import save_file

metadata = {f"key{number}": "text" for number in range(int(sys.argv[2]))}
save_file({"a": numpy.arange(6.0), "b": numpy.zeros(3)}, sys.argv[1], metadata)
PY
for number in 0 1 2 3 4 5 6 7 8 9; do
  PYTHONPATH=packages python3 save.py "six-$number" 6
  PYTHONPATH=packages python3 save.py "one-$number" 1
done
python3 - <<'PY'
import hashlib
import sys
from pathlib import Path


def hashes(name, behind_header=False):
    """How many different files there are, or parts behind their headers."""
    found = set()
    for path in Path().glob(f"{name}-*"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little") if behind_header else 0
        found.add(hashlib.sha256(data[start:]).hexdigest())
    return len(found)


six, one, tensors = hashes("six"), hashes("one"), hashes("six", behind_header=True)
print(f"hashes of 10 saves: 6 keys of metadata {six}, one key {one}; tensors' bytes {tensors}")
sys.exit("changed" if six == 1 or (one, tensors) != (1, 1) else 0)
PY
