import errno
import json
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from configs.errors import InputError
from data.migrate.page import write_page
from data.migrate.report import REPORT
from data.migrate.write import FILES, QUARANTINE, plan_files, refuse_others_files, write_files, write_quarantine
from data.sources.problems import Problem
from tests.data.migrate.made_reports import make_report
from tests.data.migrate.test_datasets import triple


@pytest.fixture
def old(tmp_path):
    """A triple of three files that hold their role."""
    folder = tmp_path / "old"
    folder.mkdir()
    paths = {role: str(folder / f"{role}.png") for role in ("target", "mask", "masked")}
    for role, path in paths.items():
        Path(path).write_text(role)
    Path(paths["target"]).chmod(0o400)
    return replace(triple("a/b", keeps_source=True), **paths, caption="a sofa")


def write(out, triples, how="copy"):
    contents = [dict.fromkeys(("target", "mask", "masked"), "0" * 32)] * len(triples)
    done = []
    num_copies = write_files(out, plan_files(triples, contents, how, max_megapixels=1.0), lambda: done.append(1))
    return num_copies, len(done)


def texts_of(out):
    return {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.*") if path.parent != out}


@pytest.mark.parametrize("how", ["copy", "link", "reference"])
def test_each_picture_stands_under_its_triples_name(old, tmp_path, how):
    assert write(tmp_path / "new", [old], how) == (0, 4)
    assert texts_of(tmp_path / "new") == {
        "target/a/b.png": "target",
        "mask/a/b.png": "mask",
        "source/a/b.png": "masked",
        "target/a/b.txt": "a sofa\n",
    }
    assert stat.S_IMODE(os.stat(old.target).st_mode) == 0o400


@pytest.mark.parametrize("how", ["copy", "link", "reference"])
def test_a_name_may_have_all_the_bytes_that_the_filesystem_allows(old, tmp_path, how):
    name = "x" * 251
    write(tmp_path / "new", [replace(old, name=name)], how)
    assert texts_of(tmp_path / "new").keys() == {
        f"{path}/{name}.{suffix}"
        for path, suffix in (("target", "png"), ("mask", "png"), ("source", "png"), ("target", "txt"))
    }


@pytest.mark.fault(29, "an old picture that is a symbolic link, where hard links are made")
def test_a_hard_link_leads_to_the_picture_where_the_old_file_is_a_symbolic_link(old, tmp_path):
    (tmp_path / "old" / "link.png").symlink_to("mask.png")
    write(tmp_path / "new", [replace(old, mask=str(tmp_path / "old" / "link.png"))], "link")
    new = tmp_path / "new" / "mask" / "a" / "b.png"
    assert not new.is_symlink() and new.samefile(tmp_path / "old" / "mask.png")


def test_what_is_left_out_or_not_needed_is_not_written(old, tmp_path):
    write(tmp_path / "new", [replace(old, keeps_source=False, caption=None), replace(old, name="c", kept=False)])
    assert texts_of(tmp_path / "new") == {"target/a/b.png": "target", "mask/a/b.png": "mask"}


def test_a_copy_does_for_a_link_between_file_systems(old, tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs /dev/shm to be another file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert write(Path(folder), [old], "link") == (3, 4)
        assert (Path(folder) / "target/a/b.png").read_text() == "target"
        assert not list(Path(folder).rglob("*.part"))


@pytest.mark.parametrize("mode, space", [("RGBA", "RGB "), ("LA", "GRAY")])
def test_a_target_keeps_its_profile_and_the_mask_from_its_transparency_has_none(old, tmp_path, mode, space):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = space.encode()  # of its header
    target = Image.new(mode, (8, 8), (90,) * (len(mode) - 1) + (255,))
    target.putpixel((2, 3), (90,) * (len(mode) - 1) + (0,))
    target.save(tmp_path / "clear.png", icc_profile=bytes(profile))
    triple = replace(old, target=f"{tmp_path}/clear.png", mask=None, masked=None, hole_from="alpha", opaque_target=True)
    write(tmp_path / "new", [replace(triple, keeps_source=False)])
    with Image.open(tmp_path / "new/target/a/b.png") as picture, Image.open(tmp_path / "new/mask/a/b.png") as hole:
        assert (picture.mode, picture.info["icc_profile"]) == (mode.removesuffix("A"), bytes(profile))
        assert picture.getpixel((2, 3)) in (90, (90, 90, 90))
        assert "icc_profile" not in hole.info and hole.getbbox() == (2, 3, 3, 4)


def test_files_of_before_go_with_their_folders_and_halves_too(old, tmp_path):
    out = tmp_path / "new"
    write(out, [old])
    (out / "mask/a/b.png.0123abcd.part").write_text("half")
    (out / "mask/a/mine.part").write_text("mine")
    write(out, [replace(old, name="c", caption=None)])
    assert texts_of(out) == {
        "target/c.png": "target",
        "mask/c.png": "mask",
        "source/c.png": "masked",
        "mask/a/mine.part": "mine",
    }
    assert not (out / "target" / "a").exists()


def test_a_caption_that_the_user_edited_stays_whatever_becomes_of_its_triple(old, tmp_path):
    out = tmp_path / "new"
    write(out, [old, replace(old, name="c")])
    (out / "target/a/b.txt").write_text("a red sofa")
    for triples in ([replace(old, caption="sks, a sofa"), replace(old, name="c", caption="sks, a sofa")], [old], []):
        assert write(out, triples) == (0, 4 * len(triples))
        assert (out / "target/a/b.txt").read_text() == "a red sofa"
    assert texts_of(out).keys() == {"target/a/b.txt"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_copy_does_where_a_file_system_has_no_links(old, tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert write(tmp_path / "new", [old], "link") == (3, 4)
    assert (tmp_path / "new/target/a/b.png").read_text() == "target"


def test_what_no_migration_wrote_is_refused_before_it_is_overwritten(old, tmp_path):
    out = tmp_path / "new"
    out.mkdir()
    (out / REPORT).write_text("mine")
    with pytest.raises(InputError, match=r"holds 1 file that no migration wrote: report\.json"):
        refuse_others_files(out)
    (out / REPORT).unlink()
    write(out, [old])
    refuse_others_files(out)
    (out / FILES).write_text("{}")
    with pytest.raises(InputError, match="no list of what a migration wrote"):
        refuse_others_files(out)


def test_a_page_of_the_users_own_is_refused_and_that_of_a_dry_run_is_not(old, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("<title>my thesis</title>")
    with pytest.raises(InputError, match=r"holds 1 file that no migration wrote: report\.html"):
        refuse_others_files(tmp_path)
    write_page(make_report(tmp_path, [], dry_run=True), [], lambda *_: None, max_megapixels=1.0)
    refuse_others_files(tmp_path)


def test_the_quarantine_lists_every_reason(old, tmp_path):
    problems = (Problem("masks", "/old/mask.png", "is no mask", "Draw one."), Problem("names", "x", "y", "z"))
    write_quarantine(tmp_path, [old, replace(old, kept=False, problems=problems)])
    lines = [json.loads(line) for line in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert [(line["mask"], line["kind"], line["cure"]) for line in lines] == [
        (old.mask, "masks", "Draw one."),
        (old.mask, "names", "z"),
    ]
