"""PSNR inside the demo's holes: untrained, trained, and the VAE's ceiling. The README quotes it.

    python benchmarks/demo_run.py [--out benchmarks/results/demo_run.jsonl]

Runs `demo/run.py`, which replaces the last demo in runs/demo.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import add_result
from demo.run import read_validation

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {"untrained": "hole_psnr_untrained", "trained": "hole_psnr", "ceiling": "hole_psnr_ceiling"}


def figures_of(validation: dict) -> dict[str, dict[str, float]]:
    """Split -> number of crops, and PSNR in dB, of a line of validation.jsonl."""
    return {
        split: {"crops": validation[split]["items"]}
        | {name: round(validation[split][key], 2) for name, key in FIGURES.items()}
        for split in ("train", "holdout")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file that the result is appended to")
    out = parser.parse_args().out
    out = out.resolve() if out is not None else None
    os.chdir(ROOT)
    start = time.monotonic()
    if code := subprocess.run([sys.executable, "demo/run.py"]).returncode:
        return code
    line = read_validation()
    minutes = round((time.monotonic() - start) / 60, 1)
    add_result({"benchmark": "demo_run", "steps": line["step"], "minutes": minutes} | figures_of(line), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
