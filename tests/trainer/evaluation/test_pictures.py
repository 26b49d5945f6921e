from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import InputError
from data.encoders.load import load_vae
from trainer.evaluation.pictures import (
    PicturePair,
    encode_prompts,
    encode_triples,
    list_triples,
    load_pair,
    load_text_encoders,
    pair_pictures,
)


def save(path: Path, *, size: tuple[int, int] = (40, 30), white: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("L", size)
    if white:
        picture.paste(255, (5, 5, 20, 20))
    picture.save(path)
    return path


def test_folders_are_paired_by_name_whatever_the_ending(tmp_path):
    for name in ("a.jpg", "b.png"):
        save(tmp_path / "images" / name)
        save(tmp_path / "masks" / Path(name).with_suffix(".webp"))
    (tmp_path / "images" / "a.txt").write_text("a chair\n", encoding="utf-8")
    pairs = pair_pictures(tmp_path / "images", tmp_path / "masks")
    assert [(pair.image.name, pair.mask.name, pair.caption) for pair in pairs] == [
        ("a.jpg", "a.webp", "a chair"),
        ("b.png", "b.webp", ""),
    ]
    assert load_pair(pairs[0], None).caption == "a chair" and load_pair(pairs[0], "a sofa").caption == "a sofa"


def test_a_palette_mask_is_read_by_its_colours(tmp_path):
    """Index 1 is white, whatever else the palette holds; read as numbers it would be next to black."""
    mask = Image.new("P", (40, 30), 0)
    mask.putpalette([0, 0, 0, 255, 255, 255, *[9] * 762])
    mask.paste(1, (10, 10, 30, 20))
    mask.save(tmp_path / "mask.png")
    pair = load_pair(PicturePair(save(tmp_path / "p.png"), tmp_path / "mask.png"), "")
    assert pair.mask.sum() == 200 and pair.mask[10:20, 10:30].all() and pair.mask.dtype == bool


@pytest.mark.parametrize(
    "what, message",
    [
        ("size", r"m\.png: 41x30, but .*p\.png is 40x30"),
        ("black", "nothing in it is white"),
        ("no mask", "there is no such file or folder"),
        ("no picture", "there is no such file or folder"),
        ("mixed", "two files, or two folders"),
        ("lacking", "holds no picture called p"),
        ("empty", "holds no pictures"),
        ("twice", r"p\.jpg and p\.png have the same name"),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path, what, message):
    image, mask = save(tmp_path / "i" / "p.png"), tmp_path / "m" / "m.png"
    save(mask, size=(41, 30) if what == "size" else (40, 30), white=what != "black")
    if what == "twice":
        save(image.with_suffix(".jpg"))
    given = {
        "no mask": (image, tmp_path / "none.png"),
        "no picture": (tmp_path / "none.png", mask),
        "mixed": (image, mask.parent),
        "lacking": (image.parent, mask.parent),
        "empty": (tmp_path, mask.parent),
        "twice": (image.parent, mask.parent),
    }.get(what, (image, mask))
    with pytest.raises(InputError, match=message):
        load_pair(pair_pictures(*given)[0], "")


def test_a_folder_of_triples_makes_the_samples_that_preprocessing_makes(samples, config, tiny_model, tmp_path):
    """Of the same files: the cached tensors are rounded to bf16."""
    cached = samples.validation_samples(split="holdout", count=2)
    folders = {role: getattr(config.data.datasets[0], role) for role in ("target", "mask", "source")}
    for role, folder in folders.items():
        (tmp_path / role).mkdir()
        for sample in cached:
            stem = sample.item.key.rpartition("-")[0]
            for path in Path(folder).glob(f"{stem}.*"):
                (tmp_path / role / path.name).write_bytes(path.read_bytes())
    pairs = list_triples(tmp_path)
    texts = encode_prompts(
        load_text_encoders(tiny_model, torch.device("cpu")),
        [pair.caption for pair in pairs],
        text_length=config.data.captions.text_length,
    )
    vae = load_vae(tiny_model, device=torch.device("cpu"), dtype=torch.float32)
    made = encode_triples(pairs, vae, texts, resolutions=config.data.resolution)
    by_key = {sample.item.key: sample for sample in made}
    for sample in cached:
        mine = by_key[sample.item.key.rpartition("-")[0]]
        assert mine.bucket == sample.bucket and mine.item.caption == sample.item.caption
        assert (mine.pixels.target == sample.pixels.target).all() and (mine.pixels.image == sample.pixels.image).all()
        for name in ("latents", "masked_latents", "t5", "pooled"):
            assert torch.allclose(mine.tensors[name].float(), sample.tensors[name].float(), atol=5e-2), name
        assert torch.equal(mine.tensors["mask"], sample.tensors["mask"])


def test_a_folder_without_the_two_is_told(tmp_path):
    with pytest.raises(InputError, match="holds no target/ and mask/"):
        list_triples(tmp_path)


def test_a_hole_that_the_crop_cuts_off_is_told(tiny_model, tmp_path):
    save(tmp_path / "target" / "p.png", size=(400, 100))
    mask = Image.new("L", (400, 100))
    mask.paste(255, (0, 0, 10, 100))
    (tmp_path / "mask").mkdir()
    mask.save(tmp_path / "mask" / "p.png")
    vae = load_vae(tiny_model, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(InputError, match="nothing of it is white"):
        encode_triples(list_triples(tmp_path), vae, {"": (torch.zeros(1), torch.zeros(1))}, resolutions=[64])


def test_each_caption_is_encoded_once(tiny_model):
    texts = encode_prompts(load_text_encoders(tiny_model, torch.device("cpu")), ["a", "b", "a"], text_length=16)
    assert [*texts] == ["a", "b"] and texts["a"][0].shape[0] == 16
    assert not np.allclose(texts["a"][0], texts["b"][0])
