"""Mask variants, mirror images and every kind of source, from the config to the bytes of the shards."""

import importlib.util
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load

from configs.errors import InputError
from configs.mask_recipe import MaskRecipe
from data.cache.open_cache import open_cache
from data.cache.validation_items import read_validation_items
from data.preprocessing.run import preprocess
from data.samples.geometry import Bucket
from data.samples.masks import dilate_masks, draw_masks
from data.samples.shard_plan import sample_bytes
from tests.data.samples.made_pictures import QUIET, SIDE, folders, planned, write_pictures


def shard_bytes(config):
    root = config.data.cache / "shards"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def stored_samples(config):
    """key -> (split, meta, latents, [masked latents], [mask])"""
    cache = open_cache(config, Path(config.model.base))
    found = {}
    for path, split in zip(cache.table.path, cache.table.split, strict=True):
        for entry in webdataset.WebDataset(str(cache.folder / str(path)), shardshuffle=False):
            count = sum(name.startswith("m") and name.endswith(".safetensors") for name in entry)
            variants = [load(entry[f"m{number}.safetensors"]) for number in range(count)]
            masks = [np.unpackbits(variant["mask"].numpy(), axis=1).astype(bool) for variant in variants]
            latents = load(entry["safetensors"])["latents"]
            masked = [variant["masked_latents"] for variant in variants]
            found[entry["__key__"]] = (str(split), json.loads(entry["json"]), latents, masked, masks)
    return found


# --- every kind of source ---------------------------------------------------------------------------------------------


def as_tars(folder):
    """One tar, made of the members in the order of their names."""
    with tarfile.open(folder / "photos.tar", "w") as archive:
        for path in sorted((folder / "target" / "photos").iterdir()):
            archive.add(path, path.name)
        for path in sorted((folder / "mask" / "photos").iterdir()):
            archive.add(path, f"{path.stem}.mask.png")
    return {"name": "photos", "tars": f"{folder}/photos.tar"}


def rows_of(folder, target, mask):
    rows = []
    for path in sorted((folder / "target" / "photos").glob("*.png")):
        text = path.with_suffix(".txt")
        caption = {"caption": text.read_text()} if text.exists() else {}
        pictures = {target: f"target/photos/{path.name}", mask: f"mask/photos/{path.name}"}
        rows.append({"id": f"photos/{path.stem}", **pictures, **caption})
    return rows


def as_list(folder):
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, reversed(rows_of(folder, "target", "mask")))))
    return {"name": "photos", "table": f"{folder}/list.jsonl", "columns": {"name": "id"}}


def as_imagefolder(folder):
    rows = rows_of(folder, "file_name", "mask_file_name")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"name": "photos", "table": str(folder), "columns": {"target": "image", "name": "id"}}


def as_parquet(folder):
    import pyarrow as pa
    from pyarrow import parquet

    rows = rows_of(folder, "image", "mask")
    for row in rows:
        row.setdefault("caption", None)  # pyarrow takes its columns from the first row
        for column in ("image", "mask"):
            path = Path(folder, row[column])
            row[column] = {"bytes": path.read_bytes(), "path": path.name}
    parquet.write_table(pa.Table.from_pylist(rows), folder / "photos.parquet")
    return {"name": "photos", "table": f"{folder}/photos.parquet", "columns": {"target": "image", "name": "id"}}


def test_every_source_gives_the_shards_of_the_folders(config_of, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    from_folders = config_of(folders(folder), "data.captions.default=a photograph")
    preprocess(from_folders, QUIET)
    expected = shard_bytes(from_folders)
    assert len(stored_samples(from_folders)) == 6
    kinds = [as_tars, as_list, as_imagefolder] + ([as_parquet] if importlib.util.find_spec("pyarrow") else [])
    for kind in kinds:
        config = config_of(kind(folder), "data.captions.default=a photograph", cache=kind.__name__)
        preprocess(config, QUIET)
        assert shard_bytes(config) == expected, kind.__name__
        assert not (config.data.cache / "copies").exists(), "left when all is encoded"


# --- variants and mirror images ---------------------------------------------------------------------------------------


RANDOM = {"random": {"brush": 0.5, "box": 0.3, "outpaint": 0.2}, "variants": 3}
RECIPE = MaskRecipe((("brush", 0.5), ("box", 0.3), ("outpaint", 0.2)), variants=3)


def test_random_variants_and_mirror_images_are_stored(config_of, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    dataset = {"name": "photos", "target": f"{folder}/target", "mask": RANDOM, "flip": True}
    config = config_of(dataset)
    preprocess(config, QUIET)
    stored = stored_samples(config)
    samples = {sample.key: sample for sample in planned(config)}
    assert stored.keys() == samples.keys() and len(stored) == 12
    for key, (split, meta, latents, masked, masks) in stored.items():
        triple = samples[key].triple
        drawn = draw_masks(RECIPE, triple.target_content, SIDE, SIDE)
        assert meta["flip"] == key.endswith("-flip") == samples[key].flip
        for mask, original in zip(masks, drawn, strict=True):
            np.testing.assert_array_equal(mask, original[:, ::-1] if meta["flip"] else original)
        assert meta["hole_fractions"] == [round(float(mask.mean()), 4) for mask in masks]
        assert len({tensor.float().numpy().tobytes() for tensor in masked}) == 3
        other = stored[triple.key if meta["flip"] else f"{triple.key}-flip"]
        assert (other[0], other[1]["caption"]) == (split, meta["caption"])
        assert not torch.equal(other[2], latents)
        assert not torch.allclose(other[2].flip(-1).float(), latents.float(), atol=1e-2), "latents cannot be mirrored"
    assert sorted(split for split, *_ in stored.values()) == ["holdout"] * 2 + ["train"] * 10

    head = open_cache(config, Path(config.model.base))
    manifest = head.manifest
    assert manifest.mask_variants == {"photos": 3}
    planned_bytes = sample_bytes(Bucket(SIDE, SIDE), num_variants=3)
    text_bytes = 2 * (32 * 64 + 32) + 1024
    for samples, size in zip(head.table.samples, head.table.bytes, strict=True):
        assert 0.5 * samples * planned_bytes < size <= samples * (planned_bytes + text_bytes) + 10240
    fractions = np.concatenate([meta["hole_fractions"] for _, meta, *_ in stored.values()])
    assert manifest.hole_fractions == {"photos": np.histogram(fractions, bins=10, range=(0, 1))[0].tolist()}
    assert sum(manifest.hole_fractions["photos"]) == 36

    for split, count in (("holdout", 1), ("train", 5)):
        items = read_validation_items(config.data.cache, split=split, count=100)
        assert len(items) == count, "mirror images are not watched"
        for item, pixels in items:
            np.testing.assert_array_equal(pixels.mask, stored[item.key][4][0])


def test_a_mirror_image_is_encoded_from_mirrored_pixels(config_of, tmp_path):
    """The same tensors as of pictures that were mirrored by hand."""
    folder = write_pictures(tmp_path / "pictures")
    config = config_of(folders(folder, flip=True))
    preprocess(config, QUIET)
    for path in folder.glob("*/photos/*.png"):
        with Image.open(path) as picture:
            mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(path)
    by_hand = config_of(folders(folder), "data.holdout=0", cache="by-hand")
    preprocess(by_hand, QUIET)
    stored, expected = stored_samples(config), stored_samples(by_hand)
    for key, (_, _, latents, masked, masks) in expected.items():
        flipped = stored[f"{key}-flip"]
        np.testing.assert_array_equal(flipped[4][0], masks[0])
        torch.testing.assert_close(flipped[2].float(), latents.float(), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(flipped[3][0].float(), masked[0].float(), atol=1e-2, rtol=1e-2)


def test_own_masks_are_stored_grown(config_of, tmp_path):
    folder = write_pictures(tmp_path / "pictures", count=3)
    mask = {"folder": f"{folder}/mask", "dilate": [0, 9], "variants": 4}
    config = config_of(folders(folder, mask=mask))
    preprocess(config, QUIET)
    recipe = MaskRecipe(dilate=(0, 9), variants=4)
    for sample in planned(config):
        with Image.open(sample.triple.mask.place) as picture:
            own = np.asarray(picture) >= 128
        masks = stored_samples(config)[sample.key][4]
        expected = dilate_masks(own, recipe, sample.triple.target_content)
        assert len(masks) == 4 and all(np.array_equal(a, b) for a, b in zip(masks, expected, strict=True))
        assert all((mask | own == mask).all() for mask in masks)


@pytest.mark.parametrize(
    "change", [{"mask": RANDOM | {"variants": 2}}, {"mask": {"random": {"box": 1.0}, "variants": 3}}, {"flip": True}]
)
def test_another_recipe_is_another_cache(config_of, tmp_path, change):
    folder = write_pictures(tmp_path / "pictures", count=3)
    dataset = {"name": "photos", "target": f"{folder}/target", "mask": RANDOM}
    config, other = config_of(dataset), config_of(dataset | change)
    preprocess(config, QUIET)
    key = next(iter(change))
    with pytest.raises(InputError, match=rf"data\.datasets\.photos\.{key} is .*, the cache was made with"):
        open_cache(other, Path(config.model.base))
    before = shard_bytes(config)
    preprocess(other, QUIET)
    changed = shard_bytes(other)
    assert all(changed.get(name) != data for name, data in before.items() if name.endswith(".tar"))
    manifest = open_cache(other, Path(config.model.base)).manifest
    assert manifest.mask_variants == {"photos": 2 if change.get("mask", {}).get("variants") == 2 else 3}
