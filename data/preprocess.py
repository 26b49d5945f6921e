"""Encode once: pictures, masks and captions -> a cache folder of shards. The job is data/preprocessing/run.py.

fluxfill preprocess CONFIG.yaml [key=value ...] [--worker I --workers N] [--dry-run] [--thorough] [--replace]
accelerate launch data/preprocess.py --config CONFIG.yaml [key=value ...]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports

if __name__ == "__main__":
    quiet_libraries()
    lighten_imports()

from rich.console import Console

from configs.errors import InputError
from configs.loading import load_config
from configs.supervision import exit_code
from data.preprocessing.run import dry_run, preprocess
from data.preprocessing.worker import which_worker


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `accelerate launch data/preprocess.py`; returns the exit code."""
    parser = argparse.ArgumentParser(description="Encode the datasets of a config into its cache.")
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--worker", type=int, help="this worker, from 0; with --workers")
    parser.add_argument("--workers", type=int, help="how many there are")
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, how large and how long")
    parser.add_argument("--thorough", action="store_true", help="decode every picture in full before encoding any")
    parser.add_argument("--replace", action="store_true", help="delete what the cache holds for another run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.resolution=[512]")
    options = parser.parse_args(arguments)
    try:
        worker = which_worker(os.environ, worker=options.worker, workers=options.workers)
        run = dry_run if options.dry_run else preprocess
        flags = {"thorough": options.thorough, "replace": options.replace}
        run(load_config(options.config, options.overrides), Console(), worker, **flags)
    except InputError as error:
        error.show()
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
