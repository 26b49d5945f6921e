"""Writes the two small caches of format 2 that stay here for good: the samples of format_v1/, as format 2 stores them.

Run once, with the code that brought format 2. Never again after it: the point of these files is that later code reads
them.

    python tests/data/cache/format_v2/make.py
"""

import shutil
from pathlib import Path

from tests.data.cache.format_v1.make import make

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    for text_dtype in ("bf16", "int8"):
        shutil.rmtree(HERE / text_dtype, ignore_errors=True)
        make(HERE / text_dtype, text_dtype, format_version=2)
