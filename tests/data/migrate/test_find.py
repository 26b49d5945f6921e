import tempfile
import unicodedata
from pathlib import Path

import pytest

from configs.errors import InputError
from data.migrate.find import find_in_folders
from data.migrate.report import OldFolders
from tests.other_user import as_nobody


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def triples_of(found):
    """name -> the files of its target, mask and masked picture."""
    return {
        triple.name: tuple(file and Path(file.place).name for file in (triple.target, triple.mask, triple.masked))
        for triple in found.triples
    }


def three(folder):
    return OldFolders(folder / "target", folder / "mask", folder / "masked")


@pytest.mark.fault(29, "names that differ in case, ends and accents")
def test_names_agree_across_suffix_case_ends_accents_and_sub_folders(tmp_path):
    nfd = unicodedata.normalize("NFD", "é")
    make_files(tmp_path / "target", "a.jpg", "B.JPG", "sub/c.png", "é.png", "d_target.png")
    make_files(tmp_path / "mask", "a_mask.png", "b.PNG", "sub/c-mask.webp", f"{nfd}.png", "d_mask.png")
    make_files(tmp_path / "masked", "a.jpeg", "b_masked.jpg", "sub/C.png", f"{nfd}_masked.png", "d-condlabel.png")
    assert triples_of(find_in_folders(three(tmp_path))) == {
        "a": ("a.jpg", "a_mask.png", "a.jpeg"),
        "B": ("B.JPG", "b.PNG", "b_masked.jpg"),
        "sub/c": ("c.png", "c-mask.webp", "C.png"),
        "é": ("é.png", f"{nfd}.png", f"{nfd}_masked.png"),
        "d": ("d_target.png", "d_mask.png", "d-condlabel.png"),
    }


@pytest.mark.fault(29, "a folder of masks that may not be read")
def test_a_folder_that_cannot_be_read_is_not_passed_over():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        make_files(folder / "target", "a.png", "locked/b.png")
        make_files(folder / "mask", "a.png", "locked/b.png").joinpath("locked").chmod(0)
        with as_nobody(), pytest.raises(InputError, match=r"mask/locked cannot be read \(Permission denied\)"):
            find_in_folders(OldFolders(folder / "target", folder / "mask"))
        (folder / "mask" / "locked").chmod(0o755)


@pytest.mark.fault(29, "links to folders and pictures, and one that leads back to a folder above it")
def test_links_are_followed_and_one_without_end_is_refused(tmp_path):
    make_files(tmp_path / "disk", "a.png")
    make_files(tmp_path / "target", "b.png")
    (tmp_path / "target" / "more").symlink_to(tmp_path / "disk")
    make_files(tmp_path / "mask", "more/a.png")
    (tmp_path / "mask" / "b.png").symlink_to(tmp_path / "disk" / "a.png")
    folders = OldFolders(tmp_path / "target", tmp_path / "mask")
    assert triples_of(find_in_folders(folders)) == {
        "more/a": ("a.png", "a.png", None),
        "b": ("b.png", "b.png", None),
    }
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "target")
    with pytest.raises(InputError, match="leads back to a folder above it, by a link"):
        find_in_folders(folders)


def test_one_folder_may_hold_all(tmp_path):
    make_files(tmp_path / "letters", "a_G.png", "a_M.png", "a_F.png", "10_x/b_G.jpg", "10_x/b_M.png")
    assert triples_of(find_in_folders(OldFolders(tmp_path / "letters"))) == {
        "a": ("a_G.png", "a_M.png", "a_F.png"),
        "10_x/b": ("b_G.jpg", "b_M.png", None),
    }
    make_files(tmp_path / "labels", "a.png", "a-masklabel.png", "a-condlabel.png")
    assert triples_of(find_in_folders(OldFolders(tmp_path / "labels"))) == {
        "a": ("a.png", "a-masklabel.png", "a-condlabel.png")
    }


def test_a_target_with_several_masks_makes_a_triple_of_each(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a_mask_1.png", "a_mask_2.png")
    found = find_in_folders(OldFolders(tmp_path / "target", tmp_path / "mask"))
    assert triples_of(found) == {
        "a_mask_1": ("a.png", "a_mask_1.png", None),
        "a_mask_2": ("a.png", "a_mask_2.png", None),
    }


def test_captions_stand_beside_target_or_masked_picture(tmp_path):
    for folder in ("target", "mask", "masked"):
        make_files(tmp_path / folder, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "target" / "a.txt").write_text("of the target")
    (tmp_path / "masked" / "a.txt").write_text("not read")
    (tmp_path / "target" / "b.caption").write_text("a caption")
    (tmp_path / "masked" / "C.txt").write_text("of the masked picture")
    (tmp_path / "target" / "d.txt").write_bytes("一辆红色摩托车".encode("gbk"))
    found = find_in_folders(three(tmp_path))
    assert [(triple.caption, triple.caption_from) for triple in found.triples[:3]] == [
        ("of the target", "target"),
        ("a caption", "target"),
        ("of the masked picture", "masked"),
    ]
    assert [problem.kind for problem in found.triples[3].problems] == ["captions"]
    assert [Path(problem.where).name for problem in found.problems] == ["a.txt"]


def test_what_has_no_partner_is_named_with_the_nearest(tmp_path):
    make_files(tmp_path / "target", "a.png", "coffee.png")
    make_files(tmp_path / "mask", "a.png", "cofee.png")
    found = find_in_folders(OldFolders(tmp_path / "target", tmp_path / "mask"))
    (coffee,) = (triple for triple in found.triples if triple.name == "coffee")
    assert "no mask of the same name" in str(coffee.problems[0]) and "the nearest is cofee.png" in str(
        coffee.problems[0]
    )
    (orphan,) = found.problems
    assert orphan.where.endswith("mask/cofee.png") and "the nearest is coffee.png" in orphan.what
    assert found.orphans == {str(tmp_path / "mask"): ["cofee.png"]}


def test_of_one_folder_what_has_no_target_is_named_whatever_it_is(tmp_path):
    make_files(tmp_path, "a.png", "a_mask.png", "a_masked.png", "b_mask.png", "c_masked.png")
    found = find_in_folders(OldFolders(tmp_path))
    assert triples_of(found) == {"a": ("a.png", "a_mask.png", "a_masked.png")}
    assert {folder: sorted(names) for folder, names in found.orphans.items()} == {
        str(tmp_path): ["b_mask.png", "c_masked.png"]
    }


def test_a_file_that_may_be_of_two_is_given_to_neither(tmp_path):
    make_files(tmp_path / "target", "Cat.png", "cat.png", "dog.jpg", "dog.png")
    make_files(tmp_path / "mask", "CAT.png", "dog.png")
    found = find_in_folders(OldFolders(tmp_path / "target", tmp_path / "mask"))
    assert [[problem.kind for problem in triple.problems] for triple in found.triples] == [["names"]] * 3
    assert "may belong to" in str(found.triples[0].problems[0])


def test_folders_without_a_name_in_common_are_refused_with_the_nearest(tmp_path):
    make_files(tmp_path / "target", "photo_001.png", "photo_002.png")
    make_files(tmp_path / "mask", "photo-1.png", "photo-2.png")
    with pytest.raises(InputError, match=r"not one name in common: photo_001\.png; the nearest is photo-1\.png"):
        find_in_folders(OldFolders(tmp_path / "target", tmp_path / "mask"))


def test_folders_may_lie_in_each_other(tmp_path):
    make_files(tmp_path, "a.png", "masks/a.png", "masks/masked/a.jpg")
    found = find_in_folders(OldFolders(tmp_path, tmp_path / "masks", tmp_path / "masks" / "masked"))
    assert triples_of(found) == {"a": ("a.png", "a.png", "a.jpg")}
    assert (found.problems, found.orphans) == ([], {})
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"--target .* holds no picture but those in masks/, which another option"):
        find_in_folders(OldFolders(tmp_path, tmp_path / "masks"))
