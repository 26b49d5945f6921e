import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from rich.console import Console
from safetensors.torch import load, load_file

from configs.errors import InputError
from configs.loading import dump_config
from data.cache.manifest import read_manifest
from data.cache.open_cache import open_cache
from data.cache.shard_index import read_index
from data.cache.validation_items import read_validation_items
from data.cache_layout import EMPTY_TEXT, VALIDATION, index_path
from data.encoders import encode
from data.encoders.encode import encode_pixels
from data.preprocess import main
from data.preprocessing.run import preprocess
from data.preprocessing.shard_queue import ShardQueue
from data.preprocessing.worker_group import WorkerGroup
from data.sources.pictures import load_mask
from data.storage.disk_full import DiskFull

QUIET = Console(quiet=True)


@pytest.fixture
def make_pictures(tmp_path):
    """Writes triples of noise, 32 px, each with a caption of its own: `make_pictures(count)`; returns their folder."""
    folder = tmp_path / "pictures"

    def make(count):
        for number in range(count):
            write_triple(folder, f"picture-{number:02d}", seed=number)
        return folder

    return make


def write_triple(folder, name, *, seed=0, size=(32, 32), hole=(8, 8, 20, 24)):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    mask = Image.new("L", size)
    if hole:
        mask.paste(255, hole)
    for role, picture in (("target", Image.fromarray(target)), ("mask", mask)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        picture.save(folder / role / f"{name}.png")
    (folder / "target" / f"{name}.txt").write_text(f"noise number {seed}")


@pytest.fixture
def config_of(demo_config, tmp_path):
    """Makes a config of a folder of `make_pictures`. T5 texts take 64 KiB each, so 16 samples fill a shard of 1 MiB."""

    def make(folder, *overrides, cache="cache"):
        datasets = [f"data.datasets=[{{name: noise, target: {folder}/target, mask: {folder}/mask}}]"]
        sizes = ["data.resolution=32", "data.holdout=0", "data.captions.text_length=512", "data.shard_size_mib=1"]
        return demo_config(tmp_path / cache, *datasets, *sizes, *overrides)

    return make


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def stamps(folder, suffix=""):
    """What tells a file that was written anew: its inode and time."""
    return {
        name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for name, path in files_below(folder).items()
        if name.endswith(suffix)
    }


def shard_bytes(cache):
    return {name: path.read_bytes() for name, path in files_below(cache / "shards").items()}


def leftovers(cache):
    return [name for name in files_below(cache) if ".part" in name]


# --- what is stored ---------------------------------------------------------------------------------------------------


def samples_of(cache):
    """Every stored sample: (split, bucket, meta, tensors), through webdataset alone."""
    for path, split, bucket in zip(cache.table.path, cache.table.split, cache.table.bucket, strict=True):
        texts = {}
        for entry in webdataset.WebDataset(str(cache.folder / str(path)), shardshuffle=False):
            if "json" not in entry:
                texts[entry["__key__"]] = load(entry["safetensors"])
                continue
            meta = json.loads(entry["json"])
            tensors = load(entry["safetensors"]) | load(entry["m0.safetensors"]) | texts[meta["text"]]
            yield str(split), str(bucket), meta, tensors


def test_every_triple_is_stored_once_and_whole(cache, triples):
    seen, counts = set(), {"train": 0, "holdout": 0}
    for split, bucket, meta, tensors in samples_of(cache):
        height, width = map(int, bucket.split("x"))
        assert meta["original_size"] == [height, width]
        assert meta["crop"] == [0, 0, height, width]
        name = meta["target"]
        assert meta["dataset"] == "photographs"
        assert meta["caption"] == (triples / "target" / name).with_suffix(".txt").read_text().strip()
        expected = np.asarray(load_mask(triples / "mask" / name, max_megapixels=1)) >= 128
        bits = np.unpackbits(tensors.pop("mask").numpy(), axis=1).astype(bool)
        np.testing.assert_array_equal(bits, expected)
        assert meta["hole_fractions"] == [round(float(expected.mean()), 4)]
        shapes = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
        latents = (16, height // 8, width // 8)
        assert shapes == {"latents": latents, "masked_latents": latents, "t5": (32, 64), "pooled": (32,)}
        for kind, tensor in tensors.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.isfinite(tensor).all(), kind
        assert not torch.equal(tensors["latents"], tensors["masked_latents"])
        seen.add(name)
        counts[split] += 1
    assert seen == {path.name for path in (triples / "target").glob("*.png")}
    assert counts == {"train": 48, "holdout": 48} == cache.manifest.samples["photographs"]


def test_constants_stand_beside_the_manifest(cache):
    empty = load_file(cache.folder / EMPTY_TEXT)
    assert (empty["t5"].shape, empty["pooled"].shape) == ((32, 64), (32,))
    for bucket in sorted(set(cache.table.bucket.tolist())):
        height, width = map(int, bucket.split("x"))
        blank = load_file(cache.folder / f"blank_{bucket}.safetensors")["masked_latents"]
        assert blank.shape == (16, height // 8, width // 8)
        assert torch.isfinite(blank).all()


def test_held_out_pictures_are_kept_for_validation(cache, triples):
    held_out = read_validation_items(cache.folder, split="holdout", count=100)
    trained = read_validation_items(cache.folder, split="train", count=100)
    assert (len(held_out), len(trained)) == (48, 48)
    for item, pixels in [*held_out[:5], *trained[:5]]:
        name = item.key.rsplit("-", 1)[0]
        for role, found in (("target", pixels.target), ("source", pixels.image)):
            with Image.open(triples / role / f"{name}.png") as picture:
                np.testing.assert_array_equal(found, np.asarray(picture))


def test_shards_say_nothing_of_the_machine_they_were_made_on(cache, triples, tiny_model):
    for data in shard_bytes(cache.folder).values():
        for secret in (triples.parent, tiny_model.parent, cache.folder.parent):
            assert str(secret).encode() not in data


def test_each_resolution_and_each_dataset_is_stored(make_pictures, config_of, tmp_path):
    folder = make_pictures(3)
    write_triple(tmp_path / "others", "wide", size=(96, 48), seed=50, hole=(40, 16, 60, 32))
    both = (
        f"data.datasets=[{{name: noise, target: {folder}/target, mask: {folder}/mask}}, "
        f"{{name: others, target: {tmp_path}/others/target, mask: {tmp_path}/others/mask, weight: 2}}]"
    )
    config = config_of(folder, both, "data.resolution=[32,48]", "data.resolution_policy=each")
    preprocess(config, QUIET)
    table = open_cache(config, Path(config.model.base)).table
    rows = sorted(zip(table.dataset.tolist(), table.bucket.tolist(), table.samples.tolist(), strict=True))
    assert rows == [("noise", "32x32", 3), ("noise", "48x48", 3), ("others", "32x32", 1), ("others", "32x64", 1)]


# --- again and again --------------------------------------------------------------------------------------------------


def test_a_second_run_touches_nothing(make_pictures, config_of):
    config = config_of(make_pictures(5), "data.holdout=2")
    preprocess(config, QUIET)
    before = stamps(config.data.cache)
    preprocess(config, QUIET)
    assert stamps(config.data.cache) == before


def test_only_the_shards_of_changed_pictures_are_written_anew(make_pictures, config_of):
    folder = make_pictures(40)
    config = config_of(folder)
    cache = config.data.cache
    preprocess(config, QUIET)
    assert len(stamps(cache, ".tar")) >= 3

    def shards_written(change):
        before = stamps(cache, ".tar")
        change()
        preprocess(config, QUIET)
        after = stamps(cache, ".tar")
        open_cache(config, Path(config.model.base))
        assert stamps(cache, ".index").keys() == {name.replace(".tar", ".index") for name in after}
        assert leftovers(cache) == []
        return sum(before.get(name) != stamp for name, stamp in after.items()), len(after)

    written, shards = shards_written(lambda: write_triple(folder, "picture-07", seed=7, hole=(0, 0, 5, 5)))
    assert written == 1 < shards
    written, shards = shards_written(lambda: write_triple(folder, "a-new-one", seed=100))
    assert 1 <= written <= 2 < shards
    written, shards = shards_written(lambda: (folder / "target" / "picture-09.txt").write_text("another caption"))
    assert 1 <= written <= 3
    written, shards = shards_written(lambda: [path.unlink() for path in folder.glob("*/picture-11.*")])
    assert written <= 1 < shards

    fresh = config_of(folder, cache="fresh")
    preprocess(fresh, QUIET)
    assert shard_bytes(cache) == shard_bytes(fresh.data.cache), "what was there before shows"
    assert read_manifest(cache) == read_manifest(fresh.data.cache)


@pytest.mark.parametrize("lost", ["tar", "index", "manifest", "table", "empty text", "blank", "validation", "picture"])
def test_what_is_lost_or_damaged_is_mended(make_pictures, config_of, lost):
    config = config_of(make_pictures(4), "data.holdout=1")
    cache = config.data.cache
    preprocess(config, QUIET)
    whole = {name: path.read_bytes() for name, path in files_below(cache).items()}
    (tar, *_) = sorted(cache.rglob("*.tar"))
    if lost in ("tar", "index"):
        (tar if lost == "tar" else index_path(tar)).unlink()
    elif lost in ("manifest", "table"):
        (cache / {"manifest": "manifest.json", "table": "shards.npz"}[lost]).write_text("<!DOCTYPE html>")
    elif lost == "validation":
        shutil.rmtree(cache / VALIDATION)
    else:
        name = {"empty text": EMPTY_TEXT, "blank": "blank_32x32.safetensors", "picture": f"{VALIDATION}/0000.mask.png"}[
            lost
        ]
        (cache / name).unlink()
    preprocess(config, QUIET)
    mended = {name: path.read_bytes() for name, path in files_below(cache).items()}
    mended.pop("shards.npz"), whole.pop("shards.npz")  # a zip holds the time of day
    assert mended == whole


def test_other_settings_make_every_shard_anew(make_pictures, config_of):
    folder = make_pictures(4)
    config = config_of(folder)
    preprocess(config, QUIET)
    before = stamps(config.data.cache, ".tar")
    longer = config_of(folder, "data.captions.text_length=64")
    preprocess(longer, QUIET)
    after = stamps(config.data.cache, ".tar")
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    with pytest.raises(InputError, match="text_length is 512, the cache was made with 64"):
        open_cache(config, Path(config.model.base))
    assert load_file(config.data.cache / EMPTY_TEXT)["t5"].shape == (64, 64)


def test_text_of_int8_is_another_cache_and_says_so(make_pictures, config_of):
    folder = make_pictures(4)
    config = config_of(folder)
    preprocess(config, QUIET)
    before = shard_bytes(config.data.cache)
    int8 = config_of(folder, "data.encoders.t5_precision=int8")
    preprocess(int8, QUIET)
    after = shard_bytes(int8.data.cache)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    assert read_manifest(int8.data.cache).settings["data.encoders.t5_precision"] == "int8"
    with pytest.raises(InputError, match="t5_precision is 'auto', the cache was made with 'int8'"):
        open_cache(config, Path(config.model.base))


# --- interruptions ----------------------------------------------------------------------------------------------------


def cut(path):
    """Keep a picture's header and lose its end: nothing tells before it is decoded."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data


def test_a_picture_that_cannot_be_decoded_stops_only_its_shard(make_pictures, config_of):
    folder = make_pictures(40)
    config = config_of(folder)
    cache = config.data.cache
    preprocess(config, QUIET)
    whole = shard_bytes(cache)
    rows = {name: read_index(cache / "shards" / name).keys for name in whole if name.endswith(".index")}
    assert len(rows) >= 3
    first, second, *others = sorted(rows)
    pictures = [folder / "target" / f"{rows[name][0].rsplit('-', 1)[0]}.png" for name in (first, second)]
    shutil.rmtree(cache)

    lost = [cut(picture) for picture in pictures]
    with pytest.raises(InputError) as caught:
        preprocess(config, QUIET)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2, "every picture at fault, in one go"
    for picture, line in zip(sorted(pictures), sorted(lines), strict=True):
        assert re.match(rf"{picture}: cannot be decoded \(.*Replace or remove the file", line)
    assert leftovers(cache) == []
    assert not (cache / "manifest.json").exists()
    expected = {name for stem in others for name in (stem, stem.replace(".index", ".tar"))}
    assert shard_bytes(cache).keys() == expected

    kept = stamps(cache / "shards")
    for picture, data in zip(pictures, lost, strict=True):
        picture.write_bytes(data)
    preprocess(config, QUIET)
    assert shard_bytes(cache) == whole
    assert {name: stamp for name, stamp in stamps(cache / "shards").items() if name in kept} == kept


@pytest.mark.parametrize("where", ["picture", "text", "empty caption"])
def test_numbers_that_are_not_finite_stop_their_shard_and_name_the_sample(make_pictures, config_of, monkeypatch, where):
    """As a broken GPU or half precision gives them. The other shards are made."""
    config = config_of(make_pictures(30))
    names = {"picture": "encode_pixels", "text": "encode_captions", "empty caption": "encode_captions"}
    module = "data.cache.dropout_tensors" if where == "empty caption" else "data.preprocessing.encode_shards"
    real, calls = getattr(encode, names[where]), []

    def encode_one_to_nan(*arguments, **options):
        encoded = real(*arguments, **options)
        calls.append(1)
        if len(calls) == 1:
            (encoded.latents if where == "picture" else encoded.t5)[0, -1, -1] = float("nan")
        return encoded

    monkeypatch.setattr(f"{module}.{names[where]}", encode_one_to_nan)
    with pytest.raises(InputError, match="holds NaN or infinity") as caught:
        preprocess(config, QUIET)
    lines = str(caught.value).splitlines()
    shards = [path for path in files_below(config.data.cache) if path.endswith(".tar")]
    assert len(lines) == 1
    if where == "empty caption":
        assert "empty_text.safetensors: t5 holds NaN" in lines[0] and not shards
    else:
        tensor = "latents" if where == "picture" else "t5"
        assert re.match(rf".*/target/picture-\d\d\.png: .*\.tar: {tensor} of ", lines[0])
        assert shards, "one picture stopped everything"
        assert where == "picture" or "The caption: 'noise number" in lines[0]
    assert not [path for path in files_below(config.data.cache) if path.endswith((".part", "manifest.json"))]
    monkeypatch.undo()
    preprocess(config, QUIET)
    assert read_manifest(config.data.cache).samples == {"noise": {"train": 30, "holdout": 0}}


MEMORY = {
    "pictures": ("data.preprocessing.encode_shards.encode_pixels", "encode [12] pictures at once", False),
    "captions": ("data.preprocessing.encode_shards.encode_captions", "encode [12] captions at once", False),
    "empty caption": ("data.cache.dropout_tensors.encode_captions", "encode the empty caption", False),
    "blank": ("data.cache.dropout_tensors.encode_images", "encode a single picture of 32x32", False),
    "measured pictures": ("data.preprocessing.dry_run.encode_pixels", "encode 2 pictures at once", True),
    "measured captions": ("data.preprocessing.dry_run.encode_captions", "encode 2 captions at once", True),
}


def test_shards_that_vanish_at_the_end_are_named(make_pictures, config_of, monkeypatch):
    config = config_of(make_pictures(3))
    claims_of_others = WorkerGroup.claims_of_others

    def and_lost(group, prefix):
        for tar in config.data.cache.rglob("*.tar"):
            tar.unlink()
        return claims_of_others(group, prefix)

    monkeypatch.setattr(
        ShardQueue, "raise_problems", lambda _: monkeypatch.setattr(WorkerGroup, "claims_of_others", and_lost)
    )
    with pytest.raises(InputError, match=r"32x32-000001\.tar: was written and is gone,.*run the same command again"):
        preprocess(config, QUIET)
    monkeypatch.undo()
    preprocess(config, QUIET)
    assert read_manifest(config.data.cache).samples == {"noise": {"train": 3, "holdout": 0}}


@pytest.mark.parametrize("where", MEMORY)
def test_a_device_without_memory_is_told_with_what_to_set(
    make_pictures, config_of, tmp_path, capsys, monkeypatch, where
):
    function, doing, dry = MEMORY[where]
    config = config_of(make_pictures(3), "data.encode_batch_size=2")

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(function, full)
    command = ["--config", write_config(tmp_path / "config.yaml", config), *(["--dry-run"] if dry else [])]
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"cpu has no memory left to {doing} \(CUDA out of memory\..*\)\. ", message)
    assert "Lower data.encode_batch_size, or place the encoders elsewhere: data.encoders sets" in message
    assert leftovers(config.data.cache) == []


def test_an_exception_leaves_no_part_and_no_manifest(make_pictures, config_of, monkeypatch):
    folder = make_pictures(6)
    config = config_of(folder, "data.encode_batch_size=2")
    cache = config.data.cache
    preprocess(config, QUIET)
    before = shard_bytes(cache)
    write_triple(folder, "picture-01", seed=1, hole=(0, 0, 5, 5))
    calls = []

    def fail_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("as of a broken GPU")
        return encode_pixels(*arguments)

    monkeypatch.setattr("data.preprocessing.encode_shards.encode_pixels", fail_at_the_second)
    with pytest.raises(RuntimeError, match="as of a broken GPU"):
        preprocess(config, QUIET)
    assert leftovers(cache) == []
    assert shard_bytes(cache) == before
    assert not (cache / "manifest.json").exists(), "it would speak of a cache that is being changed"
    preprocess(config, QUIET)
    assert open_cache(config, Path(config.model.base)).table.samples.sum() == 6
    assert shard_bytes(cache) != before


def test_what_a_killed_worker_had_half_written_is_removed(make_pictures, config_of):
    folder = make_pictures(4)
    config = config_of(folder, "data.holdout=1")
    cache = config.data.cache
    preprocess(config, QUIET)
    whole = files_below(cache).keys()
    write_triple(folder, "picture-01", seed=1, hole=(0, 0, 5, 5))
    for name in whole:
        if not name.startswith(f"{VALIDATION}/"):
            (cache / f"{name}.0123abcd.part").write_bytes(b"half")
    (cache / f"{VALIDATION}.part").mkdir()
    preprocess(config, QUIET)
    assert leftovers(cache) == []
    assert not (cache / f"{VALIDATION}.part").exists()


def test_what_a_worker_left_behind_the_end_of_the_others_is_removed_and_nothing_else_touched(make_pictures, config_of):
    """It woke when they were done, and died."""
    config = config_of(make_pictures(4))
    preprocess(config, QUIET)
    before = stamps(config.data.cache)
    for name in before:
        if "/" not in name or name.startswith("shards/"):
            (config.data.cache / f"{name}.0123abcd.part").write_bytes(b"half")
    preprocess(config, QUIET)
    assert stamps(config.data.cache) == before


@pytest.mark.parametrize("room", [0, 6, 100, 800, 1500, 2300, "all but one file"])
def test_a_full_disk_is_told_and_when_there_is_room_the_rest_is_done(
    make_pictures, config_of, small_disk, tmp_path, capsys, room
):
    """room: KiB of the 2.7 MiB that the cache takes."""
    folder = make_pictures(40)
    whole = config_of(folder)
    preprocess(whole, QUIET)
    pages = {name: -(-path.stat().st_size // 4096) * 4096 for name, path in files_below(whole.data.cache).items()}
    room = sum(pages.values()) - pages["manifest.json"] if room == "all but one file" else room << 10
    if not small_disk.is_real and room > 1 << 20:
        pytest.skip("no disk can be mounted here, and no single file is larger than this")
    config = config_of(folder, cache=small_disk.folder / "cache")
    cache = config.data.cache
    (tmp_path / "config.yaml").write_text(dump_config(config))
    command = ["--config", str(tmp_path / "config.yaml")]
    with small_disk.with_room_for(room):
        assert main(command) == 2
        assert not list(cache.rglob("*.part"))
        assert not (cache / "manifest.json").exists()
        assert not (cache / "crew").exists()
    said = capsys.readouterr().err
    message = said.splitlines()[-1]
    assert re.match(rf"{cache}\S*: cannot be written \((No space left on device|File too large)\)\. ", message)
    assert " free there" in message and "Make room and run the same command again" in message
    assert "Traceback" not in said
    if ".tar" in message:
        assert re.search(r"about [\d.]+ [MK]iB are needed", message), "for all shards that are left"

    assert main(command) == 0
    assert shard_bytes(cache) == shard_bytes(whole.data.cache)
    assert {name for name in files_below(cache)} == pages.keys()


def test_a_constant_that_does_not_fit_says_what_it_needs(make_pictures, config_of, small_disk):
    config = config_of(make_pictures(3), cache=small_disk.folder / "cache")
    preprocess(config, QUIET)
    (config.data.cache / EMPTY_TEXT).unlink()
    with (
        small_disk.with_room_for(16_384),
        pytest.raises(DiskFull, match=rf"{EMPTY_TEXT}: cannot be written .*, about 64\.\d KiB are needed"),
    ):
        preprocess(config, QUIET)
    preprocess(config, QUIET)
    open_cache(config, Path(config.model.base))


# --- bad input --------------------------------------------------------------------------------------------------------


def write_config(path, config):
    path.write_text(dump_config(config), encoding="utf-8")
    return str(path)


def refused(config, tmp_path, capsys, *overrides):
    """main()'s message for a config that it must refuse with exit code 2, leaving at most facts about pictures."""
    code = main(["--config", write_config(tmp_path / "config.yaml", config), *overrides])
    message = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in message
    cache = config.data.cache
    assert not (cache / "manifest.json").exists()
    assert all(name.startswith("scan/") for name in files_below(cache)), "with bad input no cache is begun"
    return message


BAD_PICTURES = {
    "missing mask": (
        lambda folder: (folder / "mask" / "picture-01.png").unlink(),
        r"target/picture-01\.png: no mask of the same name in \S+/mask\. Add it, or remove the target\.",
    ),
    "missing target": (
        lambda folder: (folder / "target" / "picture-01.png").unlink(),
        r"mask/picture-01\.png: no target of the same name in \S+/target\. Add it, or remove this mask\.",
    ),
    "empty folder": (
        lambda folder: [path.unlink() for path in (folder / "mask").iterdir()],
        r"dataset noise: mask folder \S+/mask holds no picture \(.*\.bmp.*\)\. Check data\.datasets\.\*\.mask\.",
    ),
    "missing folder": (
        lambda folder: shutil.rmtree(folder / "mask"),
        r"dataset noise: mask folder \S+/mask does not exist\.",
    ),
    "mask of another size": (
        lambda folder: Image.new("L", (32, 40)).save(folder / "mask" / "picture-01.png"),
        r"mask/picture-01\.png: the mask is 32x40, its target \S+target/picture-01\.png is 32x32\. Make the mask at",
    ),
    "black mask": (
        lambda folder: write_triple(folder, "picture-01", hole=None),
        r"mask/picture-01\.png: the mask is all black \(its brightest pixel is 0 of 255\): nothing to paint\. .*is it",
    ),
    "mask of 0 and 1": (
        lambda folder: Image.new("L", (32, 32), 1).save(folder / "mask" / "picture-01.png"),
        r"mask/picture-01\.png: the mask is all black \(its brightest pixel is 1 of 255\)",
    ),
    "white mask": (
        lambda folder: write_triple(folder, "picture-01", hole=(0, 0, 32, 32)),
        r"mask/picture-01\.png: the mask is all white \(its darkest pixel is 255 of 255\): nothing to keep\. .*is",
    ),
    "unreadable target": (
        lambda folder: (folder / "target" / "picture-01.png").write_text("<!DOCTYPE html>"),
        r"target/picture-01\.png: not a readable picture \(.*\)\. Replace or remove the file, or convert it",
    ),
    "unreadable mask": (
        lambda folder: cut(folder / "mask" / "picture-01.png"),
        r"mask/picture-01\.png: (cannot be decoded|not a readable picture) \(.*\)\. Replace or remove the file\.",
    ),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_are_named_and_nothing_is_begun(make_pictures, config_of, tmp_path, capsys, kind):
    spoil, pattern = BAD_PICTURES[kind]
    folder = make_pictures(3)
    spoil(folder)
    assert re.search(pattern, refused(config_of(folder), tmp_path, capsys))


def test_a_picture_above_the_limit_is_refused(make_pictures, config_of, tmp_path, capsys):
    message = refused(config_of(make_pictures(2)), tmp_path, capsys, "data.max_megapixels=0.001")
    for number in range(2):
        assert f"picture-0{number}.png: 32x32 is 0 megapixels, above data.max_megapixels 0.001" in message


def test_a_source_of_another_size_is_refused(make_pictures, config_of, tmp_path, capsys):
    folder = make_pictures(2)
    shutil.copytree(folder / "target", folder / "source")
    Image.new("RGB", (16, 32)).save(folder / "source" / "picture-01.png")
    config = config_of(folder, f"data.datasets.0.source={folder}/source")
    message = refused(config, tmp_path, capsys)
    assert "source/picture-01.png: the source is 16x32, its target" in message


def test_holding_everything_back_is_refused(make_pictures, config_of, tmp_path, capsys):
    message = refused(config_of(make_pictures(3), "data.holdout=64"), tmp_path, capsys)
    assert "data.holdout 64 keeps back all 3 pictures and leaves none to train on. Lower it below 3" in message


def test_all_that_is_wrong_is_said_at_once(make_pictures, config_of, tmp_path, capsys):
    folder = make_pictures(5)
    write_triple(folder, "picture-00", hole=None)
    write_triple(folder, "picture-03", hole=(0, 0, 32, 32))
    message = refused(config_of(folder), tmp_path, capsys)
    assert "picture-00.png: the mask is all black" in message
    assert "picture-03.png: the mask is all white" in message


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "tokenizer", "transformer"])
def test_a_model_without_a_part_is_refused(make_pictures, config_of, tiny_model, tmp_path, capsys, part):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    shutil.rmtree(model / part)
    config = config_of(make_pictures(2), f"model.base={model}")
    message = refused(config, tmp_path, capsys)
    assert f"model.base {model}: {model} lacks {part}." in message


def test_a_cache_that_cannot_be_written_is_refused(make_pictures, config_of, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    config = config_of(make_pictures(2), cache="file/cache")
    message = refused(config, tmp_path, capsys)
    assert f"data.cache {tmp_path}/file/cache: cannot be written to (Not a directory). Point data.cache at" in message


def test_a_hole_that_the_crop_loses_is_named(make_pictures, config_of):
    folder = make_pictures(2)
    write_triple(folder, "long", size=(320, 32), hole=(0, 0, 20, 32))
    with pytest.raises(
        InputError, match=r"mask/long\.png: at the size of its bucket, 32x32, there is nothing to paint"
    ):
        preprocess(config_of(folder), QUIET)


def test_bad_input_does_not_take_a_finished_cache_away(make_pictures, config_of):
    folder = make_pictures(3)
    config = config_of(folder)
    preprocess(config, QUIET)

    def encoded():
        """All but what is known of the pictures themselves, which did change."""
        return {name: stamp for name, stamp in stamps(config.data.cache).items() if not name.startswith("scan/")}

    before = encoded()
    write_triple(folder, "picture-01", hole=None)
    with pytest.raises(InputError, match="all black"):
        preprocess(config, QUIET)
    assert encoded() == before
    open_cache(config, Path(config.model.base))
