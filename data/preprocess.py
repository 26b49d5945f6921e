"""Encode once: pictures, masks and captions -> a cache folder of shards (see data/shards.py for what a shard holds).

The plan comes first and is a pure function of the pictures, so an interrupted job goes on where it stopped: a shard
with an index is whole, one made from other pictures is made anew, one no longer planned is deleted. manifest.json comes
last and goes first: a cache that has it is complete. One process does the work; a second one is refused.

    fluxfill preprocess CONFIG.yaml [key=value ...]
    accelerate launch data/preprocess.py --config CONFIG.yaml [key=value ...]
"""

import argparse
import fcntl
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config, DataConfig
from data.atomic_write import write_atomically
from data.encode import TextEncoders, encode_captions, encode_images, encode_pixels, load_text_encoders, load_vae
from data.geometry import Bucket, Pixels, choose_buckets, fit, plan_crop
from data.library_noise import quiet_libraries
from data.manifest import (
    EMPTY_TEXT,
    FORMAT_VERSION,
    HOLDOUT,
    TRAIN,
    Manifest,
    ShardTable,
    cached_settings,
    read_manifest,
    read_shard_table,
    write_manifest,
)
from data.model_folder import encoder_fingerprints, find_model, read_part_number
from data.order import ORDER_VERSION
from data.pictures import load_mask, load_picture, picture_size
from data.shard_plan import PlannedSample, ShardPlan, plan_shards
from data.shards import SampleTensors, ShardIndex, ShardWriter, index_path, read_index
from data.sources import Triple, held_out, list_triples, listed
from data.validation_items import choose_validation_items, validation_items_are_there, write_validation_items

_T = TypeVar("_T")

_DECODE_THREADS = 4  # Pillow releases the GIL, so pictures are decoded while the batch before them is encoded


def preprocess(config: Config, console: Console) -> None:
    """Bring data.cache up to date with the datasets, model and settings of a config; touch nothing if it is.

    Raises InputError for whatever the user can mend: shards finished by then stay, parts of one do not.
    """
    cache = config.data.cache
    model = find_model(config.model.base)
    encoders = encoder_fingerprints(model)
    text_width = int(read_part_number(model, "text_encoder_2", "d_model"))
    num_encoded = 0
    with _progress(console) as progress:
        plans = plan_shards(
            plan_samples(config, progress),
            size_limit=config.data.shard_size_mib << 20,
            text_bytes=config.data.captions.text_length * text_width * 2,
            encoding={"encoders": encoders, "text_length": config.data.captions.text_length},
        )
        indexes = _read_all_finished(cache, plans)
        if indexes is None or not _is_current(cache, *_describe_cache(config, model, encoders, plans, indexes)):
            with _only_process(cache):
                # A manifest speaks of a whole cache: there is none while anything in it changes.
                (cache / "manifest.json").unlink(missing_ok=True)
                num_encoded = _encode_unfinished(cache, plans, model, config.data, progress)
                delete_unplanned(cache, plans)
                indexes = _read_all_finished(cache, plans)
                if indexes is None:
                    raise RuntimeError(f"{cache}: shards that were just written are gone")
                _write_validation_pictures(cache, plans, indexes, config.data, progress)
                write_manifest(cache, *_describe_cache(config, model, encoders, plans, indexes))
    _report(console, cache, _shard_table(plans, indexes), num_encoded=num_encoded)


@contextmanager
def _only_process(cache: Path) -> Iterator[None]:
    """Keep other processes out of a cache while it changes; makes its folder. Raises InputError if one is in, or if the
    folder cannot be written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "preprocess.lock").open("w")
    except OSError as error:
        raise InputError(
            f"data.cache {cache}: cannot be written to ({error.strerror}). Point data.cache at a folder that can."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise InputError(
                f"data.cache {cache}: another process is encoding into it. Wait for it or stop it; a single process "
                "does all of the work."
            ) from None
        except OSError:
            pass  # a filesystem without locks: nothing can be told
        yield


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
    pictures = ((item, load_pixels(sample, data)) for item, sample in chosen)
    write_validation_items(cache, pictures, advance=lambda: progress.advance(bar))


# --- planning ---------------------------------------------------------------------------------------------------------


def plan_samples(config: Config, progress: Progress) -> list[PlannedSample]:
    """Every triple in its bucket(s), split and crop, from headers and masks alone.

    Raises one InputError that lists every triple at fault, or says that nothing is left to train on.
    """
    data = config.data
    bar = progress.add_task("reading", total=None)
    triples = [triple for dataset in data.datasets for triple in list_triples(dataset, data.captions)]
    progress.update(bar, total=len(triples), completed=len(triples))
    bar = progress.add_task("checking", total=len(triples))
    sizes: list[tuple[int, int]] = []
    problems: list[str] = []
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for outcome in pool.map(lambda triple: _size_or_problem(triple, data.max_megapixels), triples):
            if isinstance(outcome, InputError):
                problems.append(str(outcome))
            else:
                sizes.append(outcome)
            progress.advance(bar)
    if problems:
        raise InputError(listed(problems))
    kept = held_out((triple.target_content for triple in triples), data.holdout)
    if all(triple.target_content in kept for triple in triples):
        raise InputError(
            f"data.holdout {data.holdout} keeps back all {len(kept)} pictures and leaves none to train on. "
            f"Lower it below {len(kept)}, or add pictures."
        )
    return [
        PlannedSample(
            triple, size, bucket, plan_crop(*size, bucket), HOLDOUT if triple.target_content in kept else TRAIN
        )
        for triple, size in zip(triples, sizes, strict=True)
        for bucket in choose_buckets(*size, data.resolution, policy=data.resolution_policy)
    ]


def _size_or_problem(triple: Triple, max_megapixels: float) -> tuple[int, int] | InputError:
    try:
        return check_triple(triple, max_megapixels)
    except InputError as error:
        return error


def check_triple(triple: Triple, max_megapixels: float) -> tuple[int, int]:
    """Upright (width, height) of a triple whose pictures agree in size and whose mask has something to paint and
    something to keep. Raises InputError otherwise."""
    width, height = picture_size(triple.target, max_megapixels=max_megapixels)
    partners = [("mask", triple.mask)] + ([("source", triple.source)] if triple.source else [])
    for role, path in partners:
        size = picture_size(path, max_megapixels=max_megapixels)
        if size != (width, height):
            raise InputError(
                f"{path}: the {role} is {size[0]}x{size[1]}, its target {triple.target} is {width}x{height}. "
                f"Make the {role} anew at the target's size: stretching it would shift the hole."
            )
    levels = np.asarray(load_mask(triple.mask, max_megapixels=max_megapixels))
    if levels.max() < 128:
        raise InputError(
            f"{triple.mask}: the mask is all black (its brightest pixel is {levels.max()} of 255): nothing to paint. "
            "White marks the hole; is it inverted?"
        )
    if levels.min() >= 128:
        raise InputError(
            f"{triple.mask}: the mask is all white (its darkest pixel is {levels.min()} of 255): nothing to keep. "
            "White marks the hole; is it inverted?"
        )
    return width, height


def load_pixels(sample: PlannedSample, data: DataConfig) -> Pixels:
    """A planned sample's pictures at its bucket's size. Raises InputError, naming the file at fault."""
    triple = sample.triple
    target = load_picture(triple.target, max_megapixels=data.max_megapixels)
    mask = load_mask(triple.mask, max_megapixels=data.max_megapixels)
    source = load_picture(triple.source, max_megapixels=data.max_megapixels) if triple.source else None
    pixels = fit(target, mask, source, sample.bucket)
    if not pixels.mask.any() or pixels.mask.all():
        what = "nothing to keep" if pixels.mask.all() else "nothing to paint"
        raise InputError(
            f"{triple.mask}: at the size of its bucket, {sample.bucket}, there is {what}: that part was cut off, or is "
            "smaller than a pixel. Crop the triple yourself, or remove it."
        )
    return pixels


# --- encoding ---------------------------------------------------------------------------------------------------------


def _load_encoders(model: Path) -> tuple[torch.nn.Module, TextEncoders]:
    """VAE in fp32 (latents are the training target), text encoders in bf16 on a GPU as FLUX is used, fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    text_dtype = torch.bfloat16 if cuda else torch.float32
    vae = load_vae(model, device=device, dtype=torch.float32)
    return vae, load_text_encoders(model, device=device, dtype=text_dtype)


def read_finished(cache: Path, plan: ShardPlan) -> ShardIndex | None:
    """The index of a shard that is there, whole, and made from this very plan; else None."""
    tar = cache / plan.path
    try:
        index = read_index(index_path(tar))
    except (FileNotFoundError, InputError):
        return None
    whole = tar.is_file() and tar.stat().st_size == index.tar_bytes and index.plan == plan.plan
    return index if whole else None


def _read_all_finished(cache: Path, plans: Sequence[ShardPlan]) -> list[ShardIndex] | None:
    """The indexes of all planned shards, or None if one is not finished."""
    indexes = []
    for plan in plans:
        if (index := read_finished(cache, plan)) is None:
            return None
        indexes.append(index)
    return indexes


def encode_shard(
    cache: Path,
    plan: ShardPlan,
    vae: torch.nn.Module,
    text_encoders: TextEncoders,
    data: DataConfig,
    advance: Callable[[int], None],
) -> ShardIndex:
    """Decode, encode and write one shard. advance: told how many samples are dealt with, batch by batch.

    Raises InputError that lists every picture of it at fault.
    """
    captions = {sample.text: sample.triple.caption for sample in plan.samples}
    tokens: dict[str, int] = {}
    problems: list[str] = []
    with ShardWriter(cache / plan.path) as writer:
        for names in _batches(captions, data.encode_batch_size):
            text = encode_captions(
                text_encoders, [captions[name] for name in names], text_length=data.captions.text_length
            )
            for row, name in enumerate(names):
                writer.add_text(name, t5=text.t5[row].bfloat16(), pooled=text.pooled[row].bfloat16())
                tokens[name] = text.tokens[row]
        for batch in _decoded(plan.samples, data, problems):
            advance(len(batch))
            if problems:
                continue  # the shard will not be; the rest is decoded to find all that is wrong with it
            latents, masked_latents = encode_pixels(vae, [pixels for _, pixels in batch])
            for row, (sample, pixels) in enumerate(batch):
                writer.add_sample(
                    SampleTensors(
                        key=sample.triple.key,
                        latents=latents[row].bfloat16(),
                        masked_latents=[masked_latents[row].bfloat16()],
                        masks=[pixels.mask],
                        text=sample.text,
                        tokens=tokens[sample.text],
                        meta=_describe_sample(sample),
                    )
                )
        if problems:
            raise InputError(listed(problems))
        return writer.finish(plan=plan.plan)


def _decoded(
    samples: Sequence[PlannedSample], data: DataConfig, problems: list[str]
) -> Iterator[list[tuple[PlannedSample, Pixels]]]:
    """Batches of decoded samples, a batch ahead of the one in use. What cannot be decoded goes to `problems`."""
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:

        def submit(batch: Iterable[PlannedSample]) -> list[tuple[PlannedSample, Future[Pixels]]]:
            return [(sample, pool.submit(load_pixels, sample, data)) for sample in batch]

        batches = _batches(samples, data.encode_batch_size)
        ahead = submit(next(batches, ()))
        while ahead:
            now, ahead = ahead, submit(next(batches, ()))
            decoded = []
            for sample, future in now:
                try:
                    decoded.append((sample, future.result()))
                except InputError as error:
                    problems.append(str(error))
            yield decoded


def _batches(items: Iterable[_T], size: int) -> Iterator[tuple[_T, ...]]:
    """Runs of `size` items, the last perhaps shorter."""
    rest = iter(items)
    return iter(lambda: tuple(islice(rest, size)), ())


def _describe_sample(sample: PlannedSample) -> dict:
    triple, crop = sample.triple, sample.crop
    return {
        "caption": triple.caption,
        "dataset": triple.dataset,
        # Below its dataset's folder: a shard's bytes are the same wherever the pictures lie.
        "target": f"{triple.name}{triple.target.suffix}",
        "original_size": [sample.size[1], sample.size[0]],
        "resized": [crop.height, crop.width],
        "crop": [crop.top, crop.left, sample.bucket.height, sample.bucket.width],
        "fingerprint": triple.content,
    }


def write_constants(
    cache: Path, vae: torch.nn.Module, text_encoders: TextEncoders, buckets: Iterable[Bucket], data: DataConfig
) -> None:
    """What belongs to no sample: the empty caption (for caption dropout), and per bucket the latents of a picture that
    is all hole."""
    text = encode_captions(text_encoders, [""], text_length=data.captions.text_length)
    empty = {"t5": text.t5[0].bfloat16().contiguous(), "pooled": text.pooled[0].bfloat16().contiguous()}
    write_atomically(cache / EMPTY_TEXT, partial(save_file, empty))
    for bucket in buckets:
        grey = torch.zeros(1, 3, bucket.height, bucket.width)
        blank = {"masked_latents": encode_images(vae, grey)[0].bfloat16().cpu().contiguous()}
        write_atomically(_blank_path(cache, str(bucket)), partial(save_file, blank))


def _blank_path(cache: Path, bucket: str) -> Path:
    return cache / f"blank_{bucket}.safetensors"


# --- the cache folder's head ------------------------------------------------------------------------------------------


def delete_unplanned(cache: Path, plans: Sequence[ShardPlan]) -> None:
    """Remove shards that no plan names (their pictures went elsewhere) and what an interrupted job left."""
    planned = {cache / plan.path for plan in plans}
    planned |= {index_path(tar) for tar in planned}
    planned |= {_blank_path(cache, str(plan.bucket)) for plan in plans}
    ours = [*(cache / "shards").rglob("*"), *cache.glob("blank_*.safetensors"), *cache.glob("*.part")]
    for path in ours:
        if path.suffix in {".tar", ".index", ".safetensors", ".part"} and path.is_file() and path not in planned:
            path.unlink()


def _describe_cache(
    config: Config,
    model: Path,
    encoders: dict[str, str],
    plans: Sequence[ShardPlan],
    indexes: Sequence[ShardIndex],
) -> tuple[Manifest, ShardTable]:
    """The head of the finished cache."""
    names = [dataset.name for dataset in config.data.datasets]
    holes = np.concatenate([index.hole_fraction.ravel() for index in indexes])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        order_version=ORDER_VERSION,
        settings=cached_settings(config),
        encoders=encoders,
        vae_shift=read_part_number(model, "vae", "shift_factor"),
        vae_scale=read_part_number(model, "vae", "scaling_factor"),
        text_length=config.data.captions.text_length,
        text_dtype="bf16",
        text_width=int(read_part_number(model, "text_encoder_2", "d_model")),
        pooled_width=int(read_part_number(model, "text_encoder", "hidden_size")),
        mask_variants=dict.fromkeys(names, 1),
        samples={name: _count_splits(plans, name) for name in names},
        hole_fractions=np.histogram(holes, bins=10, range=(0, 1))[0].tolist(),
    )
    return manifest, _shard_table(plans, indexes)


def _is_current(cache: Path, manifest: Manifest, table: ShardTable) -> bool:
    """Whether a cache has this very head, and what else belongs to it."""
    try:
        found, found_table = read_manifest(cache), read_shard_table(cache)
    except InputError:
        return False
    constants = [cache / EMPTY_TEXT, *(_blank_path(cache, str(bucket)) for bucket in np.unique(table.bucket))]
    return (
        found == manifest
        and all(np.array_equal(column, vars(found_table)[name]) for name, column in vars(table).items())
        and all(path.is_file() for path in constants)
        and validation_items_are_there(cache)
    )


def _shard_table(plans: Sequence[ShardPlan], indexes: Sequence[ShardIndex]) -> ShardTable:
    return ShardTable(
        path=np.array([plan.path for plan in plans]),
        dataset=np.array([plan.dataset for plan in plans]),
        bucket=np.array([str(plan.bucket) for plan in plans]),
        split=np.array([plan.split for plan in plans]),
        samples=np.array([index.num_samples for index in indexes], dtype=np.int64),
        bytes=np.array([index.tar_bytes for index in indexes], dtype=np.int64),
        sha256=np.array([index.tar_sha256 for index in indexes]),
        plan=np.array([plan.plan for plan in plans]),
    )


def _count_splits(plans: Sequence[ShardPlan], dataset: str) -> dict[str, int]:
    counts = Counter({TRAIN: 0, HOLDOUT: 0})
    for plan in plans:
        if plan.dataset == dataset:
            counts[plan.split] += len(plan.samples)
    return dict(counts)


class _SpeedColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def _report(console: Console, cache: Path, table: ShardTable, *, num_encoded: int) -> None:
    summary = Table(
        "dataset", "bucket", "split", *("shards", "samples", "MiB"), title=f"cache {cache}", title_justify="left"
    )
    for column in summary.columns[3:]:
        column.justify = "right"
    groups = sorted(
        {(str(d), str(b), str(s)) for d, b, s in zip(table.dataset, table.bucket, table.split, strict=True)}
    )
    for dataset, bucket, split in groups:
        rows = (table.dataset == dataset) & (table.bucket == bucket) & (table.split == split)
        samples, mib = int(table.samples[rows].sum()), table.bytes[rows].sum() / 2**20
        summary.add_row(dataset, bucket, split, str(int(rows.sum())), str(samples), f"{mib:.1f}")
    console.print(summary)
    console.print(
        f"{num_encoded} of {int(table.samples.sum())} samples were encoded now, the others were there already."
    )


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
