"""Export of a checkpoint for any program that reads FLUX.1, by one process without a GPU.

python -m trainer.export.from_checkpoint CHECKPOINT_OR_RUN --out DIR [--step N|best] [--format FORMAT]
    [--weights live|ema] [--dtype fp32|bf16|fp8]

Reads the canonical layout (checkpoints/tensor_files.py), whatever engine and ranks wrote it, one tensor at a time.
"""

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports

if __name__ == "__main__":
    quiet_libraries()
    lighten_imports()

from configs.best_figure import best_figure
from configs.errors import InputError
from configs.loading import load_config
from configs.supervision import exit_code
from data.storage.checkpoint_folders import checkpoint_folder
from data.storage.new_folder import clear, new_folder
from trainer.checkpoints.find import find_checkpoint, list_steps, read_chosen, refuse_damaged, refuse_step_of_no_run
from trainer.checkpoints.keep import best_checkpoint
from trainer.checkpoints.weights import KINDS
from trainer.export.card import metadata_of, write_card
from trainer.export.dtypes import DTYPES
from trainer.export.evaluated import best_evaluated
from trainer.export.formats import FORMATS, choose_dtype, write_format
from trainer.export.trained import open_trained
from trainer.export.velocity import refuse_other_velocity, streamed_velocity

BEST = "best"

log = logging.getLogger("fluxfill")


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    step: str | None = None,
    form: str = "diffusers",
    weights: str = "live",
    dtype: str | None = None,
    base: str | None = None,
) -> None:
    """Write what a run had trained at a checkpoint in one of FORMATS, read it back and compare its velocity.

    source: a checkpoint, or a run, whose newest intact one is taken, and the next where the run deletes that one
    meanwhile.  step: of a run, a number or BEST, which may change likewise.  weights:
    "live", or "ema", their average.  dtype: of DTYPES; None: adapters in fp32, models in bf16.  base: hub id or folder
    of the model that the run began with; None: where its config says.  Raises InputError if there is no such
    checkpoint, it is damaged, cannot be had so, or `out` is there already.
    """

    def write(folder: Path) -> None:
        clear(temporary)
        trained = open_trained(folder, weights, base=base)
        chosen = choose_dtype(trained, form, dtype)
        log.info("%s: %s weights of %s, step %d", folder, weights, trained.config.run.name, trained.step)
        metadata = metadata_of(trained, form, chosen)
        written = write_format(trained, temporary, form, DTYPES[chosen], metadata)
        live = streamed_velocity(trained.live, trained.read_live)
        refuse_other_velocity(live, streamed_velocity(trained.plain, written.read), out, DTYPES[chosen])
        write_card(trained, temporary, metadata, written.usage)

    is_named = not (source / "checkpoints").is_dir() or (step is not None and step.isdecimal())
    with new_folder(out) as temporary:  # before the checkpoint is chosen, for which all of it is read
        read_chosen(partial(choose_checkpoint, source, step, weights), write, by_name=is_named)


def choose_checkpoint(source: Path, step: str | None = None, weights: str = "live") -> Path:
    """`find_checkpoint`, where a step may also be BEST: what the run's evaluation of these weights found best, else its
    validation, whichever weights that was of: checkpoint.keep_best goes by it too."""
    if step is None or step.isdecimal():
        return find_checkpoint(source, None if step is None else int(step))
    if step != BEST:
        raise InputError(f"--step {step}: is no number, nor {BEST}. There are {list_steps(source)}.")
    refuse_step_of_no_run(source)
    if (best := best_evaluated(source, weights)) is not None and checkpoint_folder(source, best).is_dir():
        return find_checkpoint(source, best)
    config = load_config(source / "config.yaml", saved_by_a_run=True)
    if (found := best_checkpoint(source, best_figure(config))) is None:
        raise InputError(f"--step best: no checkpoint of {source} was validated. Give a number: {list_steps(source)}.")
    log.info("%s: best by the validation of the %s weights", found, config.validation.weights)
    return refuse_damaged(found)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export.from_checkpoint", description=export_checkpoint.__doc__
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--step", metavar="N|best", default=None)
    parser.add_argument("--format", choices=FORMATS, default="diffusers")
    parser.add_argument("--weights", choices=[*KINDS], default="live")
    parser.add_argument("--dtype", choices=[*DTYPES], default=None)
    parser.add_argument("--base", default=None)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        export_checkpoint(
            options.source,
            options.out,
            step=options.step,
            form=options.format,
            weights=options.weights,
            dtype=options.dtype,
            base=options.base,
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
