import os
import re
import tempfile
import unicodedata
from pathlib import Path

import pytest

from configs.errors import InputError
from data.sources.folders import list_folders
from data.sources.problems import LEFT_OUT, Findings, ProblemsFound
from tests.data.sources.made_triples import dataset, make_files, triples_of
from tests.other_user import as_nobody


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
    with pytest.raises(InputError, match=rf"dataset cats: {role} folder {tmp_path}/{role} holds no picture \(\.avif, "):
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


@pytest.mark.fault(29, "names that are not UTF-8")
def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    (Path(os.fsdecode(os.fsencode(tmp_path / "mask") + b"/caf\xe9.png"))).write_bytes(b"")
    with pytest.raises(InputError, match=r"mask folder .*: the name of 'caf\\udce9' is not UTF-8. Rename it"):
        triples_of(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_passed_over():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        make_files(folder / "target", "a.png", "locked/b.png")
        make_files(folder / "mask", "a.png", "locked/b.png")
        (folder / "target" / "locked").chmod(0)
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o777)
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


def test_the_caption_beside_the_target_comes_first_and_an_empty_one_is_none(tmp_path):
    for role in ("target", "mask", "source"):
        make_files(tmp_path / role, "a.png", "empty.png")
    for role, text in (("target", "of the target"), ("source", "of the source")):
        (tmp_path / role / "a.txt").write_text(text)
        (tmp_path / role / "empty.txt").write_text("" if role == "target" else text)
    captions = [triple.caption for triple in triples_of(tmp_path, source=True, default="a photograph")]
    assert captions == ["of the target", "a photograph"]


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    (tmp_path / "target" / "a.txt").write_bytes("gr\xfcn".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 text .* Save the caption as UTF-8"):
        triples_of(tmp_path)


def notes_of(folder, *, source=False):
    findings = Findings()
    config = dataset(folder, source=source)
    list_folders(config.target, config.mask, config.source, "cats", findings)
    assert findings.problems == []
    return findings.notes


def test_pictures_of_other_suffixes_are_counted(tmp_path):
    for role in ("target", "mask"):
        make_files(tmp_path / role, "a.png")
    make_files(tmp_path / "target", "b.heic", "c.HEIC", "deep/d.svg", "Thumbs.db", "notes.pdf")
    make_files(tmp_path / "mask", "b.heic")
    assert [(note.kind, note.where, note.what) for note in notes_of(tmp_path)] == [
        (LEFT_OUT, f"{tmp_path}/target", "2 .heic not read: b.heic, c.HEIC"),
        (LEFT_OUT, f"{tmp_path}/target", "1 .svg not read: d.svg"),
        (LEFT_OUT, f"{tmp_path}/mask", "1 .heic not read: b.heic"),
    ]


def test_each_picture_that_is_not_read_is_counted_also_without_a_suffix_or_of_one_name(tmp_path):
    for role in ("target", "mask"):
        make_files(tmp_path / role, "a.png")
    make_files(tmp_path / "target", "b.png", "c.cr2", "c.heic", "c.xcf")
    (tmp_path / "target" / "b.png").rename(tmp_path / "target" / "d41d8cd9")
    (tmp_path / "target" / "LICENSE").write_text("of the pictures")
    assert [note.what for note in notes_of(tmp_path)] == [
        "1 .cr2 not read: c.cr2",
        "1 .heic not read: c.heic",
        "1 .xcf not read: c.xcf",
        "1 without a suffix not read: d41d8cd9",
    ]


@pytest.mark.parametrize("folder", ["@eaDir", "__MACOSX", "deep/$RECYCLE.BIN", ".thumbnails"])
def test_what_systems_keep_beside_pictures_is_passed_over(tmp_path, folder):
    for role in ("target", "mask"):
        make_files(tmp_path / role, "a.png", "._a.png", ".DS_Store")
    make_files(tmp_path / "target", f"{folder}/a.png", f"{folder}/b.txt")
    assert [triple.name for triple in triples_of(tmp_path)] == ["a"] and notes_of(tmp_path) == []


@pytest.mark.parametrize("target, mask", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_differ_only_in_how_unicode_writes_them_belong_together(tmp_path, target, mask):
    name = "Käfer/größe ñ"
    make_files(tmp_path / "target", unicodedata.normalize(target, f"{name}.png"))
    make_files(tmp_path / "mask", unicodedata.normalize(mask, f"{name}.png"))
    (tmp_path / "target" / unicodedata.normalize(mask, "Käfer")).mkdir(exist_ok=True)
    (tmp_path / "target" / unicodedata.normalize(mask, f"{name}.txt")).write_text("a beetle")
    (triple,) = triples_of(tmp_path)
    assert triple.name == unicodedata.normalize(target, name), "as the target's file has it: a shard's key hangs on it"
    assert triple.caption == "a beetle"


@pytest.mark.parametrize(
    "mask, hint",
    [
        ("photo_0l.png", "the nearest is photo_0l.png"),
        ("deep/photo_01.png", "the nearest is deep/photo_01.png"),
        ("photo_01.heic", "photo_01.heic is there, which is not read"),
    ],
)
def test_a_file_that_is_nearly_the_missing_one_is_named(tmp_path, mask, hint):
    make_files(tmp_path / "target", "photo_01.png", "other.png")
    make_files(tmp_path / "mask", mask, "other.png")
    with pytest.raises(
        InputError, match=rf"photo_01\.png: no mask of the same name in \S+; {re.escape(hint)}\. Add it"
    ):
        triples_of(tmp_path)


def test_each_of_several_masks_makes_a_sample(tmp_path):
    make_files(tmp_path / "target", "a.png", "deep/b.png", "c.png", "d_mask.png")
    make_files(tmp_path / "mask", "a.mask0.png", "a_mask_01.png", "deep/b-mask.png", "deep/b.png", "c_Mask2.png")
    make_files(tmp_path / "mask", "d_mask.png")
    (tmp_path / "target" / "a.txt").write_text("a cat")
    (tmp_path / "target" / "a_mask_01.txt").write_text("its tail")
    triples = triples_of(tmp_path)
    assert {triple.name: (Path(triple.target.place).stem, triple.caption) for triple in triples} == {
        "a.mask0": ("a", "a cat"),
        "a_mask_01": ("a", "its tail"),
        "c_Mask2": ("c", ""),
        "d_mask": ("d_mask", ""),
        "deep/b": ("b", ""),
        "deep/b-mask": ("b", ""),
    }
    assert len({triple.key for triple in triples}) == 6
    assert len({triple.target_content for triple in triples if triple.name.startswith("a")}) == 1, "of one split"


def test_several_masks_have_a_source_each_or_one_for_all(tmp_path):
    make_files(tmp_path / "target", "a.png", "b.png", "c.png")
    make_files(tmp_path / "mask", *(f"{letter}_mask_{number}.png" for letter in "abc" for number in (1, 2)))
    make_files(tmp_path / "source", "a.png", "b_mask_1.png", "b_mask_2.png", "c_mask_1.png")
    with pytest.raises(ProblemsFound) as caught:
        triples_of(tmp_path, source=True)
    (problem,) = caught.value.problems
    assert problem.where.endswith("mask/c_mask_2.png") and "no source of the same name" in problem.what
    make_files(tmp_path / "source", "c_mask_2.png")
    sources = {triple.name: Path(triple.source.place).stem for triple in triples_of(tmp_path, source=True)}
    assert sources == {"a_mask_1": "a", "a_mask_2": "a"} | {
        f"{x}_mask_{n}": f"{x}_mask_{n}" for x in "bc" for n in (1, 2)
    }
