"""Export of a checkpoint: an adapter or a FLUX.1-Fill folder, by one process without a GPU.

python -m trainer.export.from_checkpoint CHECKPOINT_OR_RUN --out DIR [--weights live|ema] [--dtype fp32|bf16]

Reads the canonical layout (checkpoints/tensor_files.py), whatever engine and ranks wrote it, one tensor at a time.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports

if __name__ == "__main__":
    quiet_libraries()
    lighten_imports()

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from configs.errors import InputError
from configs.loading import load_config
from configs.supervision import BAD_INPUT
from data.encoders.model_folder import find_model, read_part_config
from trainer.adapters.build import add_adapter
from trainer.adapters.files import save_adapter
from trainer.checkpoints.folders import COMPLETE, find_damage, latest_checkpoint
from trainer.checkpoints.tensor_files import StateFiles
from trainer.export.verify import verify_adapter_file, verify_model
from trainer.export.write import export_model
from trainer.model.flux import DEV_CHANNELS, empty_transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KINDS = {"live": "weight", "ema": "ema"}

log = logging.getLogger("fluxfill")


def export_checkpoint(source: Path, out: Path, *, weights: str = "live", dtype: str | None = None) -> None:
    """Write the `final` or `final-ema` of a run that had ended at a checkpoint, and read it back.

    source: a checkpoint, or a run, whose newest intact one is taken.  weights: "live", or "ema", their average.  dtype:
    of DTYPES; None: adapters in fp32, models in bf16.  Raises InputError if the checkpoint is damaged or holds no such
    weights, or `out` is there already.
    """
    if out.exists():
        raise InputError(f"--out {out}: is there already. Give another, or remove it.")
    folder = find_checkpoint(source)
    config = load_config(folder / "config.yaml", saved_by_a_run=True)
    method = config.method
    model = find_model(config.model.base)
    files = StateFiles(folder)
    if _KINDS[weights] not in files.kinds():
        raise InputError(f"{folder}: holds no moving average: the run had train.ema_decay=null. Give --weights live.")
    transformer = empty_transformer(model, dtype=torch.float32)
    if method.type != "full":
        expanded = read_part_config(model, "transformer").get("in_channels", DEV_CHANNELS) == DEV_CHANNELS
        add_adapter(transformer, method.model_copy(update={"init_from": None}), expanded=expanded, seed=0)
    shapes = {name: parameter.shape for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    if {name: shape.numel() for name, shape in shapes.items()} != files.sizes:
        raise InputError(
            f"{folder}: trained another model than {model}, which model.base of its config.yaml names: their tensors "
            "differ. Put the base back that the run began with."
        )
    log.info("%s: %s weights of %s, step %s", folder, weights, config.run.name, folder.name.rpartition("-")[2])
    chosen = DTYPES[dtype or ("bf16" if method.type == "full" else "fp32")]
    if method.type == "full":
        export_model(transformer, model, out, weights=_read(files, weights, shapes), dtype=chosen)
        verify_model(transformer, out, weights=_read(files, weights, shapes), dtype=chosen)
    else:
        _export_adapter(transformer, out, dict(_read(files, weights, shapes)), chosen)


def find_checkpoint(source: Path) -> Path:
    """The checkpoint at `source`, or the newest intact one of the run there. Raises InputError if there is none."""
    if (source / COMPLETE).is_file():
        if damage := find_damage(source):
            raise InputError(f"{source}: {damage}. Export the checkpoint before it.")
        return source
    if (source / "checkpoints").is_dir() and (found := latest_checkpoint(source)) is not None:
        return found
    what = "holds no intact checkpoint" if source.is_dir() else "there is no such folder"
    raise InputError(f"{source}: {what}. Give a run's folder, or one of its checkpoints/step-<number>.")


def _read(files: StateFiles, weights: str, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, files.read(_KINDS[weights], name, 0, shape.numel()).view(shape)


def _export_adapter(
    transformer: FluxTransformer2DModel, out: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    temporary = out.with_name(f"{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    save_adapter(transformer, temporary, tensors=tensors, dtype=dtype)
    verify_adapter_file(transformer, temporary, tensors, dtype)
    temporary.rename(out)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export.from_checkpoint", description=export_checkpoint.__doc__
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", choices=[*_KINDS], default="live")
    parser.add_argument("--dtype", choices=[*DTYPES], default=None)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        export_checkpoint(options.source, options.out, weights=options.weights, dtype=options.dtype)
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
