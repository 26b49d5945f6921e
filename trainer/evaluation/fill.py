"""Fills of pictures of one's own, by the sampler that validation uses; `fluxfill fill`.

python -m trainer.evaluation.fill SOURCE --image P --mask M [--prompt T] [--step N] [--weights live|ema] [--out DIR]

Pictures keep their size: what is around the hole is cut out, filled at the size that the model was trained for, its
colours matched to the picture's outside the hole, and pasted back with a feathered seam.
"""

import argparse
import gc
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports

if __name__ == "__main__":
    quiet_libraries()
    lighten_imports()

import numpy as np
import torch
from PIL import Image

from configs.errors import InputError, os_errors_named
from configs.supervision import exit_code
from data.show.picture_grid import GridItem, save_grid
from data.storage.atomic_write import write_atomically
from trainer.checkpoints.find import find_checkpoint
from trainer.evaluation.paste import cut_window, paste, plan_window
from trainer.evaluation.pictures import (
    TEXT_LENGTH,
    MaskedPicture,
    PicturePair,
    encode_prompts,
    load_pair,
    load_text_encoders,
    pair_pictures,
)
from trainer.evaluation.tuned_model import (
    TunedModel,
    Weights,
    find_checkpoints,
    find_source,
    refuse_other_weights,
)
from trainer.validation.sampler import NOISE_SEED, FillRequest, Sampler, to_unit
from trainer.validation.sampling_vae import load_sampling_vae

SAMPLER_STEPS = 28  # where no run's config says
RESOLUTION = 1024  # likewise
FEATHER = 8.0

log = logging.getLogger("fluxfill")


def fill_pictures(
    path: Path,
    pairs: Sequence[PicturePair],
    out: Path,
    *,
    prompt: str | None = None,
    step: int | None = None,
    weights: Weights = "live",
    base: str | None = None,
    resolution: int | None = None,
    sampler_steps: int | None = None,
    feather: float = FEATHER,
    seed: int = NOISE_SEED,
) -> list[Path]:
    """Write out/<name>.png, the filled picture, and out/<name>.grid.png beside it, for each; returns the former.

    path: a run, a checkpoint or an export.  prompt: None: the .txt beside each picture.  step: None: the newest.
    resolution, sampler_steps: None: the run's.  Raises InputError before a model is loaded, if pictures, masks or the
    source are not what they should be.
    """
    source = find_source(path, base=base)
    if source.run is not None and step is None:
        folder: Path | None = find_checkpoint(source.path)
    else:
        folder = next(iter(find_checkpoints(source, [] if step is None else [step])), None)
    refuse_other_weights(source, folder, weights)
    for pair in pairs:
        if (out / f"{pair.image.stem}.png").resolve() in (pair.image.resolve(), pair.mask.resolve()):
            raise InputError(f"--out {out}: there {pair.image.stem}.png would be overwritten. Give another folder.")
    pictures = [load_pair(pair, prompt) for pair in pairs]
    with os_errors_named(out, cure=" Give another folder by --out."):  # now, not after the fills
        out.mkdir(parents=True, exist_ok=True)
    config = source.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # First, and gone before the transformer comes: T5 is as large as half of it.
    encoders = load_text_encoders(source.model, device)
    length = config.data.captions.text_length if config is not None else TEXT_LENGTH
    texts = encode_prompts(encoders, [picture.caption for picture in pictures], text_length=length)
    del encoders
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = TunedModel(source, device)
    if folder is not None:
        (model.load_newest if step is None else model.load_checkpoint)(folder, weights)
    steps = sampler_steps or (config.validation.sampler_steps if config is not None else SAMPLER_STEPS)
    vae = load_sampling_vae(source.model, device=device, dtype=model.dtype)
    sampler = Sampler(source.model, vae, device=device, dtype=model.dtype, flow=source.flow, steps=steps)
    pipeline = sampler.open(model.transformer)
    size = resolution or (max(config.data.resolution) if config is not None else RESOLUTION)
    written = []
    for picture in pictures:
        window = plan_window(picture.mask, size)
        part, hole = cut_window(picture.picture, picture.mask, window)
        request = FillRequest(picture.name, to_unit(part), torch.from_numpy(hole), *texts[picture.caption])
        with torch.no_grad():
            fill = sampler.sample(pipeline, [request], seed=seed)[0]
        pixels = fill.mul(255).round().byte().permute(1, 2, 0).numpy()
        filled = paste(picture.picture, picture.mask, pixels, window, feather=feather)
        written.append(_save(out, picture, filled))
    return written


def _save(out: Path, picture: MaskedPicture, filled: np.ndarray) -> Path:
    path = out / f"{picture.name}.png"
    shown, mask = to_unit(picture.picture), torch.from_numpy(picture.mask)
    stages = [shown, torch.where(mask, 0.5, shown), to_unit(filled), mask.float().unsqueeze(0)]
    height, width = picture.mask.shape
    grid = GridItem([stages], [f"{picture.name} · {width}x{height}"], picture.caption)
    with os_errors_named(path):
        write_atomically(path, partial(Image.fromarray(filled).save, format="PNG"))
        columns = ("picture", "hole", "filled", "mask")
        write_atomically(out / f"{picture.name}.grid.png", partial(save_grid, columns=columns, items=[grid], cell=384))
    return path


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluation.fill", description=fill_pictures.__doc__)
    parser.add_argument("source", type=Path, metavar="RUN_OR_EXPORT")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--mask", type=Path, required=True)
    parser.add_argument("--prompt", default=None)
    parser.add_argument("--step", type=int, default=None)
    parser.add_argument("--weights", choices=["live", "ema"], default="live")
    parser.add_argument("--base", default=None)
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--sampler-steps", type=int, default=None)
    parser.add_argument("--feather", type=float, default=FEATHER)
    parser.add_argument("--seed", type=int, default=NOISE_SEED)
    parser.add_argument("--out", type=Path, default=Path("fills"))
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        pairs = pair_pictures(options.pop("image"), options.pop("mask"))
        for path in fill_pictures(options.pop("source"), pairs, options.pop("out"), **options):
            print(path)
    except InputError as error:
        error.show()
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
