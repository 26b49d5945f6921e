import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.data_schema import CaptionsConfig, DataConfig
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from data.sources.problems import Findings
from data.sources.triples import Triple, held_out, list_triples


def make_files(folder, *names):
    """Pictures whose bytes and pixels are a function of their folder's and their own name; masks half white."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(f"{folder.name}/{name}".encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        if folder.name == "mask":
            pixels[:8], pixels[8:] = 255, seed % 128
        if path.suffix.lower() in Image.registered_extensions():
            Image.fromarray(pixels).save(path)
        else:
            path.write_bytes(pixels.tobytes())


def dataset(folder, *, source=False):
    return DatasetConfig(
        name="cats",
        target=folder / "target",
        mask=folder / "mask",
        source=folder / "source" if source else None,
    )


def triples_of(folder, *, source=False, **captions):
    config = dataset(folder, source=source)
    data = DataConfig(cache=folder / "cache", datasets=[config], captions=CaptionsConfig(**captions))
    findings = Findings()
    triples = [triple for triple, _ in list_triples(config, data, lambda count: None, findings)]
    findings.raise_problems()
    return triples


def test_files_of_one_name_make_a_triple(tmp_path):
    make_files(tmp_path / "target", "b.JPG", "a.png", "deep/er/a.webp", "two.dots.png")
    make_files(tmp_path / "mask", "a.png", "b.png", "deep/er/a.png", "two.dots.png")
    make_files(tmp_path / "source", "a.jpeg", "b.tif", "deep/er/a.bmp", "two.dots.tiff")
    triples = triples_of(tmp_path, source=True)
    assert [triple.name for triple in triples] == ["a", "b", "deep/er/a", "two.dots"]
    for triple in triples:
        parts = [Path(file.place) for file in (triple.target, triple.mask, triple.source)]
        assert [path.parent.relative_to(tmp_path).parts[0] for path in parts] == ["target", "mask", "source"]
        assert {path.stem for path in parts} == {Path(triple.name).name}
        assert triple.dataset == "cats"


def test_a_dataset_without_sources_has_none(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    assert triples_of(tmp_path)[0].source is None


def test_every_file_without_partners_is_named(tmp_path):
    make_files(tmp_path / "target", "both.png", "no-mask.png", "no-source.png")
    make_files(tmp_path / "mask", "both.png", "no-source.png", "mask-only.png")
    make_files(tmp_path / "source", "both.png", "no-mask.png", "source-only.png")
    with pytest.raises(InputError) as caught:
        triples_of(tmp_path, source=True)
    lines = str(caught.value).splitlines()
    expected = [
        rf"target/no-mask\.png: no mask of the same name in {tmp_path}/mask\. Add it",
        rf"target/no-source\.png: no source of the same name in {tmp_path}/source\. Add it",
        rf"mask/mask-only\.png: no target of the same name in {tmp_path}/target\. Add it",
        rf"source/source-only\.png: no target of the same name in {tmp_path}/target\. Add it",
    ]
    assert len(lines) == len(expected)
    for pattern, line in zip(expected, lines, strict=True):
        assert re.search(pattern, line)


@pytest.mark.parametrize("role", ["target", "mask", "source"])
def test_an_empty_folder_is_named(tmp_path, role):
    for other in {"target", "mask", "source"} - {role}:
        make_files(tmp_path / other, "a.png")
    make_files(tmp_path / role, "notes.txt", ".hidden.png", ".cache/a.png")
    with pytest.raises(InputError, match=rf"dataset cats: {role} folder {tmp_path}/{role} holds no picture \(\.bmp, "):
        triples_of(tmp_path, source=True)


def test_a_missing_folder_is_named(tmp_path):
    make_files(tmp_path / "target", "a.png")
    with pytest.raises(InputError, match=rf"mask folder {tmp_path}/mask does not exist. Check data.datasets.\*.mask"):
        triples_of(tmp_path)


def test_pictures_that_differ_in_suffix_alone_are_refused(tmp_path):
    make_files(tmp_path / "target", "a.jpg", "a.png", "b.png", "c/b.png")
    make_files(tmp_path / "mask", "a.png", "b.png", "c/b.png")
    with pytest.raises(InputError, match=r"a\.jpg and a\.png have the same name\. Keep one of them\.$"):
        triples_of(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    (Path(os.fsdecode(os.fsencode(tmp_path / "mask") + b"/caf\xe9.png"))).write_bytes(b"")
    with pytest.raises(InputError, match=r"mask folder .*: the name of 'caf\\udce9' is not UTF-8. Rename it"):
        triples_of(tmp_path)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything: within the context it is another user."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_read_is_not_passed_over():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        make_files(folder / "target", "a.png", "locked/b.png")
        make_files(folder / "mask", "a.png", "locked/b.png")
        (folder / "target" / "locked").chmod(0)
        with as_nobody(), pytest.raises(InputError, match=r"target/locked cannot be read \(Permission denied\)"):
            triples_of(folder)
        (folder / "target" / "locked").chmod(0o755)


def test_a_captions_suffix_may_be_in_capitals(tmp_path):
    for role in ("target", "mask"):
        make_files(tmp_path / role, "CAT.PNG")
    (tmp_path / "target" / "CAT.TXT").write_text("a cat")
    (triple,) = triples_of(tmp_path)
    assert triple.caption == "a cat"


@pytest.mark.parametrize("where", ["target", "source"])
def test_a_caption_stands_beside_the_target_or_the_source(tmp_path, where):
    for role in ("target", "mask", "source"):
        make_files(tmp_path / role, "a.b.png", "plain.png")
    (tmp_path / where / "a.b.txt").write_text("\ufeff a grey\n  cat, \t鴨 \n", encoding="utf-8")
    captions = {t.name: t.caption for t in triples_of(tmp_path, source=True, default="a photograph")}
    assert captions == {"a.b": "a grey cat, 鴨", "plain": "a photograph"}


def test_the_caption_beside_the_target_comes_first_even_when_empty(tmp_path):
    for role in ("target", "mask", "source"):
        make_files(tmp_path / role, "a.png", "empty.png")
    for role, text in (("target", "of the target"), ("source", "of the source")):
        (tmp_path / role / "a.txt").write_text(text)
        (tmp_path / role / "empty.txt").write_text("" if role == "target" else text)
    captions = [triple.caption for triple in triples_of(tmp_path, source=True, default="a photograph")]
    assert captions == ["of the target", ""]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a cat", "sks, a cat"),
        ("", "sks"),
        ("a sks cat", "a sks cat"),
        ("a cat, sks.", "a cat, sks."),
        ("a cat behind masks", "sks, a cat behind masks"),
        ("一只sks猫", "一只sks猫"),
    ],
)
def test_the_trigger_word_stands_in_every_caption_once(tmp_path, text, expected):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    (tmp_path / "target" / "a.txt").write_text(text, encoding="utf-8")
    assert triples_of(tmp_path, trigger="sks")[0].caption == expected


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    (tmp_path / "target" / "a.txt").write_bytes("gr\xfcn".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 text .* Save the caption as UTF-8"):
        triples_of(tmp_path)


def test_keys_fit_a_tar_and_never_meet(tmp_path):
    names = [
        "cat",
        "a/cat",
        "b/cat",
        "a_cat",
        "a-cat",
        "a cat",
        "a.cat",
        "кот",
        "猫",
        "犬",
        "c" * 200,
        "c" * 199 + "d",
        "text",
        "text-0123456789abcdef",
        "-",
    ]
    path = tmp_path / "any"
    keys = [Triple(dataset, name, path, path, None, "", "", "").key for dataset in ("cats", "cats-2") for name in names]
    assert len(set(keys)) == 2 * len(names)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,70}", key)


def test_content_shows_every_change_and_target_content_those_of_the_target(tmp_path):
    for role in ("target", "mask", "source"):
        make_files(tmp_path / role, "a.png")
    (before,) = triples_of(tmp_path, source=True)
    assert before.target_content == before.target.read(1 << 20).content
    for role in ("mask", "source", "target"):
        with (tmp_path / role / "a.png").open("ab") as file:
            file.write(b"\0")
        (after,) = triples_of(tmp_path, source=True)
        assert after.content != before.content
        assert (after.target_content == before.target_content) == (role != "target")
        before = after


def test_copies_of_a_picture_are_held_out_together(tmp_path):
    for number in range(20):
        for name in (f"{number}.png", f"copies/again-{number}.png", f"copies/{number}-flip.jpg"):
            make_files(tmp_path / "mask", Path(name).with_suffix(".png").as_posix())
            (tmp_path / "target" / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((16, 16, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "target" / name, format="PNG")
    triples = triples_of(tmp_path)
    kept = held_out((triple.target_content for triple in triples), 7)
    sides = {}
    for triple in triples:
        number = re.search(r"\d+", Path(triple.name).name)[0]
        sides.setdefault(number, set()).add(triple.target_content in kept)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {True} for side in sides.values()) == 7


@pytest.mark.parametrize("num_new", [1, 10, 200])
def test_new_pictures_move_few_old_ones_across(num_new):
    old = [f"{number * 2654435761 % 2**32:032x}" for number in range(500)]
    new = [f"{number * 2246822519 % 2**32:032x}" for number in range(1, num_new + 1)]
    before, after = held_out(old, 64), held_out([*old, *new], 64)
    assert len(before) == len(after) == 64
    moved = before - after
    assert len(moved) == len(after & set(new)) <= num_new
    assert after - set(new) <= before, "an old picture came out of training"


def test_nothing_and_more_than_everything_can_be_held_out():
    assert held_out(["a", "b"], 0) == frozenset()
    assert held_out(["a", "b", "b"], 5) == {"a", "b"}
