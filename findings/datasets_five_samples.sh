#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1. No torch. About a minute to install (380 MB).
# load_dataset("webdataset") looks at the first five samples of the first tar. If one of the five has a member more, the
# whole tar is refused; if the first to have it is the sixth, the member is dropped from every sample of every tar, with
# no warning, streaming or not. So a caption that begins late in a tar is lost, or the tar is refused, by the order
# in which the files were written.
# Seen, eight samples with a .json, and a .txt from the fifth or the sixth on:
#   from the fifth: ValueError   from the sixth: columns __key__, __url__, json   the same, streaming: the same
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --target packages datasets==5.2.0 pyarrow==26.0.1
export HF_HOME=$work/home HF_HUB_OFFLINE=1 PYTHONPATH=packages
python3 - <<'PY'
import io
import json
import sys
import tarfile

from datasets import disable_progress_bars, load_dataset

disable_progress_bars()


def columns(first, *, streaming):
    """Columns of a tar whose samples have a text from the first-th on."""
    with tarfile.open(f"{first}.tar", "w") as tar:
        for number in range(1, 9):
            members = {"json": json.dumps({"number": number}), **({"txt": "a caption"} if number >= first else {})}
            for suffix, text in members.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
    try:
        rows = list(load_dataset("webdataset", data_files=f"{first}.tar", split="train", streaming=streaming))
    except ValueError:
        return "ValueError"
    return len(rows), sorted(set().union(*rows))


seen = [columns(5, streaming=False), columns(6, streaming=False), columns(6, streaming=True)]
print(*seen, sep="\n")
kept = (8, ["__key__", "__url__", "json"])
sys.exit(seen != ["ValueError", kept, kept] and "changed")
PY
