import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.errors import InputError
from tests.data.sources.made_triples import make_files, triples_of


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


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    (tmp_path / "target" / "a.txt").write_bytes("gr\xfcn".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 text .* Save the caption as UTF-8"):
        triples_of(tmp_path)
