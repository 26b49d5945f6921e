"""One planned shard -> its tar and index: decode, encode, write."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from configs.errors import InputError
from configs.schema import DataConfig
from data.atomic_write import write_atomically
from data.decode_samples import batched, decode_batches
from data.encode import TextEncoders, encode_captions, encode_images, encode_samples
from data.geometry import Bucket
from data.manifest import EMPTY_TEXT
from data.shard_plan import PlannedSample, ShardPlan
from data.shards import SampleTensors, ShardIndex, ShardWriter, index_path, read_index
from data.sources import listed


def read_finished(cache: Path, plan: ShardPlan) -> ShardIndex | None:
    """The index of a shard that is there, whole, and made from this very plan; else None."""
    tar = cache / plan.path
    try:
        index = read_index(index_path(tar))
    except (FileNotFoundError, InputError):
        return None
    whole = tar.is_file() and tar.stat().st_size == index.tar_bytes and index.plan == plan.plan
    return index if whole else None


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
        for names in batched(captions, data.encode_batch_size):
            text = encode_captions(
                text_encoders, [captions[name] for name in names], text_length=data.captions.text_length
            )
            for row, name in enumerate(names):
                writer.add_text(name, t5=text.t5[row].bfloat16(), pooled=text.pooled[row].bfloat16())
                tokens[name] = text.tokens[row]
        for batch in decode_batches(plan.samples, data, problems):
            advance(len(batch))
            if problems:
                continue  # the shard will not be; the rest is decoded to find all that is wrong with it
            encoded = encode_samples(vae, [variants for _, variants in batch])
            for (sample, variants), tensors in zip(batch, encoded, strict=True):
                writer.add_sample(
                    SampleTensors(
                        key=sample.key,
                        latents=tensors.latents.bfloat16(),
                        masked_latents=[latents.bfloat16() for latents in tensors.masked_latents],
                        masks=[pixels.mask for pixels in variants],
                        text=sample.text,
                        tokens=tokens[sample.text],
                        meta=_describe_sample(sample),
                    )
                )
        if problems:
            raise InputError(listed(problems))
        return writer.finish(plan=plan.plan)


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
        "flip": sample.flip,  # after the crop
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
        write_atomically(blank_path(cache, str(bucket)), partial(save_file, blank))


def blank_path(cache: Path, bucket: str) -> Path:
    return cache / f"blank_{bucket}.safetensors"
