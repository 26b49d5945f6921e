"""Encode once: pictures, masks and captions -> a cache folder of shards (see data/shards.py for what a shard holds).

The plan comes first and is a pure function of the pictures, so an interrupted job goes on where it stopped: a shard
with an index is whole, one made from other pictures is made anew, one no longer planned is deleted. manifest.json comes
last and goes first: a cache that has it is complete. One process does the work; a second one is refused.

    fluxfill preprocess CONFIG.yaml [key=value ...]
    accelerate launch data/preprocess.py --config CONFIG.yaml [key=value ...]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config, DataConfig
from data.cache_head import delete_unplanned, describe_cache, is_current, shard_table
from data.cache_lock import lock_cache
from data.decode_samples import load_pixels
from data.encode import TextEncoders, load_text_encoders, load_vae
from data.encode_shards import encode_shard, read_finished, write_constants
from data.library_noise import quiet_libraries
from data.manifest import write_manifest
from data.model_folder import encoder_fingerprints, find_model, read_part_number
from data.plan_samples import plan_samples
from data.preprocess_report import open_progress, print_report
from data.shard_plan import ShardPlan, plan_shards
from data.shards import ShardIndex
from data.validation_items import choose_validation_items, write_validation_items


def preprocess(config: Config, console: Console) -> None:
    """Bring data.cache up to date with the datasets, model and settings of a config; touch nothing if it is.

    Raises InputError for whatever the user can mend: shards finished by then stay, parts of one do not.
    """
    cache, captions = config.data.cache_folder, config.data.captions
    model = find_model(config.model.base)
    encoders = encoder_fingerprints(model)
    text_width = int(read_part_number(model, "text_encoder_2", "d_model"))
    num_encoded = 0
    with open_progress(console) as progress:
        plans = plan_shards(
            plan_samples(config, progress),
            size_limit=config.data.shard_size_mib << 20,
            text_bytes=captions.text_length * (text_width + 4 if captions.text_dtype == "int8" else text_width * 2),
            encoding={
                "encoders": encoders,
                "text_length": captions.text_length,
                "text_dtype": captions.text_dtype,
            },
        )
        indexes = _read_all_finished(cache, plans)
        if indexes is None or not is_current(cache, *describe_cache(config, model, encoders, plans, indexes)):
            with lock_cache(cache):
                # A manifest speaks of a whole cache: there is none while anything in it changes.
                (cache / "manifest.json").unlink(missing_ok=True)
                num_encoded = _encode_unfinished(cache, plans, model, config.data, progress)
                delete_unplanned(cache, plans)
                indexes = _read_all_finished(cache, plans)
                if indexes is None:
                    raise RuntimeError(f"{cache}: shards that were just written are gone")
                _write_validation_pictures(cache, plans, indexes, config.data, progress)
                write_manifest(cache, *describe_cache(config, model, encoders, plans, indexes))
    print_report(console, cache, shard_table(plans, indexes), num_encoded=num_encoded)


def _encode_unfinished(
    cache: Path, plans: Sequence[ShardPlan], model: Path, data: DataConfig, progress: Progress
) -> int:
    """Write the constants and every shard that is not there yet; returns how many samples were encoded.

    Raises one InputError that lists all pictures at fault, once every shard without one is written.
    """
    todo = [plan for plan in plans if read_finished(cache, plan) is None]
    num_samples = sum(len(plan.samples) for plan in todo)
    bar = progress.add_task("encoding", total=num_samples)
    vae, text_encoders = _load_encoders(model)
    write_constants(cache, vae, text_encoders, {plan.bucket for plan in plans}, data)
    problems = []
    for plan in todo:
        try:
            encode_shard(cache, plan, vae, text_encoders, data, advance=partial(progress.advance, bar))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return num_samples


def _write_validation_pictures(
    cache: Path, plans: Sequence[ShardPlan], indexes: Sequence[ShardIndex], data: DataConfig, progress: Progress
) -> None:
    chosen = choose_validation_items(plans, indexes, count=max(data.holdout, 8))
    bar = progress.add_task("validation pictures", total=len(chosen))
    pictures = ((item, load_pixels(sample, data)[0]) for item, sample in chosen)
    write_validation_items(cache, pictures, advance=lambda: progress.advance(bar))


def _load_encoders(model: Path) -> tuple[torch.nn.Module, TextEncoders]:
    """VAE in fp32 (latents are the training target), text encoders in bf16 on a GPU as FLUX is used, fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    text_dtype = torch.bfloat16 if cuda else torch.float32
    vae = load_vae(model, device=device, dtype=torch.float32)
    return vae, load_text_encoders(model, device=device, dtype=text_dtype)


def _read_all_finished(cache: Path, plans: Sequence[ShardPlan]) -> list[ShardIndex] | None:
    """The indexes of all planned shards, or None if one is not finished."""
    indexes = []
    for plan in plans:
        if (index := read_finished(cache, plan)) is None:
            return None
        indexes.append(index)
    return indexes


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `accelerate launch data/preprocess.py`; returns the exit code."""
    parser = argparse.ArgumentParser(description="Encode the datasets of a config into its cache.")
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.resolution=[512]")
    options = parser.parse_args(arguments)
    if os.environ.get("RANK", "0") != "0":
        return 0  # accelerate launch starts a process per GPU, and the first does all of the work
    console = Console()
    quiet_libraries()
    try:
        preprocess(load_config(options.config, options.overrides), console)
    except InputError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
