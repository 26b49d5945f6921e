"""What preprocessing refuses, and what it leaves when it fails (data/preprocessing/run.py)."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.errors import InputError
from configs.loading import dump_config
from data.cache.manifest import read_manifest
from data.cache.open_cache import open_cache
from data.cache.shard_index import read_index
from data.cache_layout import EMPTY_TEXT
from data.encoders import encode
from data.preprocess import main
from data.preprocessing.run import dry_run, preprocess
from data.preprocessing.shard_queue import ShardQueue
from data.preprocessing.worker_group import WorkerGroup
from data.storage.disk_full import DiskFull
from tests.data.made_caches import index_of
from tests.data.preprocessing.made_jobs import (
    BAD_PICTURES,
    QUIET,
    cut,
    files_below,
    leftovers,
    shard_bytes,
    stamps,
    write_triple,
)


def test_a_picture_that_cannot_be_decoded_stops_only_its_shard(make_pictures, config_of):
    folder = make_pictures(40)
    config = config_of(folder)
    cache = config.data.cache
    preprocess(config, QUIET)
    whole = shard_bytes(cache)
    rows = {name: read_index(index_of(cache / "shards" / name)).keys for name in whole}
    assert len(rows) >= 3
    first, second, *others = sorted(rows)
    pictures = [folder / "target" / f"{rows[name][0].rsplit('-', 1)[0]}.png" for name in (first, second)]
    shutil.rmtree(cache)

    lost = [cut(picture) for picture in pictures]
    with pytest.raises(InputError) as caught:
        preprocess(config, QUIET)
    *lines, cure = str(caught.value).splitlines()
    assert len(lines) == 2, "every picture at fault, in one go"
    assert cure.startswith(
        f"data.cache {cache} cannot be trained from until it is complete. Mend what is named or remove"
    )
    for picture, line in zip(sorted(pictures), sorted(lines), strict=True):
        assert re.match(rf"{picture}: cannot be decoded \(.*Replace or remove the file", line)
    assert leftovers(cache) == []
    assert not (cache / "manifest.json").exists()
    assert shard_bytes(cache).keys() == set(others)
    assert {path.stem for path in (cache / "index").glob("*/*")} == {Path(name).stem for name in others}

    kept = stamps(cache / "shards")
    for picture, data in zip(pictures, lost, strict=True):
        picture.write_bytes(data)
    preprocess(config, QUIET)
    assert shard_bytes(cache) == whole
    assert {name: stamp for name, stamp in stamps(cache / "shards").items() if name in kept} == kept


@pytest.mark.fault(14, "an encoder that gives NaN")
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
    assert len(lines) == (1 if where == "empty caption" else 2)  # and what to do
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
        assert main(command) == 1
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


def test_holes_that_the_crop_loses_are_all_named_before_anything_is_encoded(make_pictures, config_of):
    """By the dry run too; and a cache that was complete before them stays so."""
    folder = make_pictures(2)
    config = config_of(folder)
    preprocess(config, QUIET)
    before = {name: stamp for name, stamp in stamps(config.data.cache).items() if not name.startswith("scan/")}
    write_triple(folder, "long", size=(320, 32), hole=(0, 0, 20, 32))
    write_triple(folder, "high", size=(32, 320), hole=(0, 300, 32, 320))
    for command in (preprocess, dry_run, partial(dry_run, thorough=True)):
        with pytest.raises(InputError) as raised:
            command(config, QUIET)
        for name in ("long", "high"):
            wanted = f"mask/{name}.png: at the size of its bucket, 32x32, there is nothing to paint: of the picture"
            assert wanted in str(raised.value)
    after = {name: stamp for name, stamp in stamps(config.data.cache).items() if not name.startswith("scan/")}
    assert after == before
    open_cache(config, Path(config.model.base))
    for name in ("long", "high"):
        for role in ("target", "mask"):
            (folder / role / f"{name}.png").unlink()
    preprocess(config, QUIET)


def test_a_cache_whose_new_picture_cannot_be_decoded_is_complete_again_once_that_is_gone(make_pictures, config_of):
    """At most the shard is encoded again into which the new picture would have come."""
    folder = make_pictures(20)
    config = config_of(folder, "data.shard_size_mib=1")
    preprocess(config, QUIET)
    before = stamps(config.data.cache / "shards")
    write_triple(folder, "new", seed=99)
    cut(folder / "target" / "new.png")
    with pytest.raises(InputError, match=r"(?s)new\.png: cannot be decoded .*run the same command again: what is enc"):
        preprocess(config, QUIET)
    for role in ("target", "mask"):
        (folder / role / "new.png").unlink()
    preprocess(config, QUIET)
    open_cache(config, Path(config.model.base))
    after = stamps(config.data.cache / "shards")
    assert sum(after[name] == stamp for name, stamp in before.items()) >= len(before) - 1


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
