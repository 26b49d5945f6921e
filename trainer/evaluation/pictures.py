"""Pictures of one's own with their masks: files, or folders in which they go by the same name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import InputError, list_problems
from data.batches.training_set import ValidationSample
from data.cache.validation_items import ValidationItem
from data.encoders.encode import collate_pixels, encode_captions, encode_pixels
from data.encoders.load import TextEncoders, load_clip, load_t5
from data.samples.geometry import Pixels, choose_buckets, fit
from data.samples.plan import HOLDOUT
from data.sources.pictures import PICTURE_SUFFIXES, load_mask, load_picture

_MEGAPIXELS = 200.0
TEXT_LENGTH = 512  # of FluxFillPipeline


@dataclass(frozen=True)
class MaskedPicture:
    """picture: uint8 [H, W, 3].  mask: bool [H, W], True = paint."""

    name: str
    picture: np.ndarray
    mask: np.ndarray
    caption: str


@dataclass(frozen=True)
class PicturePair:
    """The files of a picture and its mask."""

    image: Path
    mask: Path
    source: Path | None = None

    @property
    def caption(self) -> str:
        text = self.image.with_suffix(".txt")
        return text.read_text(encoding="utf-8").strip() if text.is_file() else ""


def pair_pictures(images: Path, masks: Path, sources: Path | None = None) -> list[PicturePair]:
    """A picture and its mask, or those of two folders with the same names, whatever their endings.

    Raises InputError that names every picture without a mask.
    """
    for flag, path in (("--image", images), ("--mask", masks)):
        if not path.exists():
            raise InputError(f"{flag} {path}: there is no such file or folder.")
    if images.is_dir() != masks.is_dir():
        raise InputError(f"--image {images} and --mask {masks}: give two files, or two folders.")
    if not images.is_dir():
        return [PicturePair(images, masks)]
    found = _by_stem(images)
    by_name = {folder: _by_stem(folder) for folder in (masks, sources) if folder is not None}
    if not found:
        raise InputError(f"{images}: holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}).")
    lacking = [
        f"{path}: {folder} holds no picture called {stem}"
        for stem, path in found.items()
        for folder, others in by_name.items()
        if stem not in others
    ]
    if lacking:
        raise InputError(list_problems(lacking) + "\nGive every picture its mask, by the same name.")
    return [
        PicturePair(path, by_name[masks][stem], by_name[sources][stem] if sources else None)
        for stem, path in found.items()
    ]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES):
        if path.stem in found:
            raise InputError(f"{folder}: {found[path.stem].name} and {path.name} have the same name. Rename one.")
        found[path.stem] = path
    return found


def load_pair(pair: PicturePair, prompt: str | None) -> MaskedPicture:
    """A picture and its mask, white = paint. prompt: None: what a .txt beside the picture says.

    Raises InputError if one cannot be read, they differ in size, or nothing is to be painted.
    """
    picture = load_picture(pair.image, max_megapixels=_MEGAPIXELS)
    mask = load_mask(pair.mask, max_megapixels=_MEGAPIXELS)
    _refuse_other_size(pair.mask, mask.size, pair.image, picture.size)
    hole = np.array(mask) >= 128
    if not hole.any():
        raise InputError(f"{pair.mask}: nothing in it is white, so there is nothing to paint. White = repaint.")
    return MaskedPicture(pair.image.stem, np.array(picture), hole, pair.caption if prompt is None else prompt)


def _refuse_other_size(file: Path, size: tuple[int, int], picture: Path, expected: tuple[int, int]) -> None:
    if size != expected:
        raise InputError(
            f"{file}: {size[0]}x{size[1]}, but {picture} is {expected[0]}x{expected[1]}. Give a mask of the picture's "
            "own size."
        )


def list_triples(folder: Path) -> list[PicturePair]:
    """The triples in folder/target and folder/mask, and folder/source where there is one."""
    if not (folder / "target").is_dir() or not (folder / "mask").is_dir():
        raise InputError(f"--data {folder}: holds no target/ and mask/ folders of pictures with the same names.")
    sources = folder / "source"
    return pair_pictures(folder / "target", folder / "mask", sources if sources.is_dir() else None)


def load_text_encoders(model: Path, device: torch.device) -> TextEncoders:
    """CLIP and T5, in bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return TextEncoders(*load_clip(model, device=device, dtype=dtype), *load_t5(model, device=device, dtype=dtype))


def encode_prompts(
    encoders: TextEncoders, captions: Sequence[str], *, text_length: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Caption -> (t5 [L, D], pooled [P]) on the CPU, each encoded once."""
    found = {}
    for caption in dict.fromkeys(captions):
        text = encode_captions(encoders, [caption], text_length=text_length)
        found[caption] = (text.t5[0].cpu(), text.pooled[0].cpu())
    return found


def encode_triples(
    pairs: Sequence[PicturePair],
    vae: object,
    texts: dict[str, tuple[Tensor, Tensor]],
    *,
    resolutions: Sequence[int],
) -> list[ValidationSample]:
    """Triples of a folder as validation samples: cut and encoded as preprocessing does."""
    samples = []
    for pair in pairs:
        target = load_picture(pair.image, max_megapixels=_MEGAPIXELS)
        mask = load_mask(pair.mask, max_megapixels=_MEGAPIXELS)
        source = load_picture(pair.source, max_megapixels=_MEGAPIXELS) if pair.source is not None else None
        _refuse_other_size(pair.mask, mask.size, pair.image, target.size)
        if source is not None:
            _refuse_other_size(pair.source or pair.image, source.size, pair.image, target.size)
        bucket = choose_buckets(*target.size, resolutions, policy="one")[0]
        cut = fit(target, mask, source, bucket)
        pixels = Pixels(cut.target.copy(), cut.image.copy(), cut.mask.copy())
        if not pixels.mask.any():
            raise InputError(f"{pair.mask}: at {bucket} nothing of it is white, so there is nothing to paint.")
        encoded = encode_pixels(vae, collate_pixels([[pixels]]))
        t5, pooled = texts[pair.caption]
        tensors = {
            "latents": encoded.latents[0].cpu(),
            "masked_latents": encoded.masked_latents[0, 0].cpu(),
            "mask": torch.from_numpy(np.packbits(pixels.mask, axis=-1)),
            "t5": t5,
            "pooled": pooled,
        }
        item = ValidationItem(pair.image.stem, HOLDOUT, pair.image.parent.name, "", 0, pair.caption)
        samples.append(ValidationSample(item, pixels, bucket, tensors))
    return samples
