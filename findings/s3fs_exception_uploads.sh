#!/usr/bin/env bash
# s3fs 2026.9.0 against the S3 server of moto 5.2.5 on this machine. One to three minutes to install (190 MB).
# An exception inside `with s3.open(url, "wb")` completes the upload: leaving the block closes the file, and closing it
# sends what was written so far, at once or as the last of several parts. Half an object then stands in the bucket as if
# it were all of it, in the place of the older one, though S3 itself shows an object only once its upload is ended.
# Seen: an object of 3 bytes, then a writer that fails after n bytes
#   n = 1: 1 byte in the bucket   n = 12,000,000: 12,000,000 bytes in the bucket
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages s3fs==2026.9.0 'moto[server]==5.2.5'
export PYTHONPATH=packages AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION=us-east-1
python3 - <<'PY'
import logging
import sys

import s3fs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
host, port = server.get_host_and_port()
s3 = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}")
s3.mkdir("bucket")
seen = {}
for size in (1, 12_000_000):
    s3.pipe_file("bucket/object", b"old")
    try:
        with s3.open("bucket/object", "wb") as file:
            file.write(bytes(size))
            raise InterruptedError("the rest cannot be computed")
    except InterruptedError:
        seen[size] = s3.info("bucket/object")["size"]
server.stop()
print(seen)
sys.exit(seen != {1: 1, 12_000_000: 12_000_000} and "changed")
PY
